"""Programs that do harm: by family, what each tries. They find the names of `World` in tests/test_code.py before them.

They are only ever run in `moe_rl.rl.rewards.sandbox`.
"""

FAMILIES = {
    'fork': [
        ('import os\n'
         'while True: os.fork()'),
        ('import os\n'
         'while True:\n'
         '  try: os.fork()\n'
         '  except OSError: pass'),
        ('import subprocess, sys\n'
         'while True: subprocess.Popen([sys.executable, "-c", "while True: pass"])'),
        ('import multiprocessing as m\n'
         'for i in range(10**4): m.Process(target=lambda: [0 for _ in iter(int, 1)]).start()'),
        ('import threading\n'
         'while True: threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()'),
        ('import os\n'
         'for _ in range(8):\n'
         '  if os.fork() == 0:\n'
         '    os.setsid()\n'
         '    while True: os.fork()'),
        ('import os\n'
         'os.execv("/bin/sh", ["sh", "-c", ":(){ :|:& };:; while true; do :; done"])'),
    ],
    'loop': [
        'while True: pass',
        ('import time\n'
         'while True: time.sleep(1)'),
        '9**9**9**9',
        'sum(iter(int, 1))',
        ('import re\n'
         're.match("(a+)+b", "a" * 60)'),
        ('def f(): f()\n'
         'while True:\n'
         '  try: f()\n'
         '  except RecursionError: pass'),
        ('import signal\n'
         'for s in range(1, 64):\n'
         '  try: signal.signal(s, signal.SIG_IGN)\n'
         '  except (OSError, ValueError): pass\n'
         'while True: pass'),
        ('import os\n'
         'os.close(1); os.close(2); os.close(3)\n'
         'while True: pass'),
    ],
    'memory': [
        'x = "a" * 10**11',
        ('x = []\n'
         'while True: x.append(bytearray(10**7))'),
        'x = [0] * 10**10',
        ('import mmap\n'
         'x = [mmap.mmap(-1, 2**30) for _ in range(100)]'),
        'x = 1 << 10**12',
        ('x = {}\n'
         'for i in range(10**9): x[i] = str(i) * 1000'),
        ('import os\n'
         'for _ in range(12): os.fork()\n'
         'x = bytearray(10**9)\n'
         'import time\n'
         'time.sleep(60)'),
        'open("/tmp/m", "wb").write(bytearray(2**30))',
    ],
    'delete': [
        ('import os\n'
         'os.remove(CANARY)'),
        ('import shutil\n'
         'shutil.rmtree(FOLDER)'),
        ('import os\n'
         'os.rename(CANARY, CANARY + "x")'),
        'open(CANARY, "w").write("gone")',
        'open(CANARY, "a").write("gone")',
        ('import os\n'
         'os.truncate(CANARY, 0)'),
        ('import os\n'
         'os.system(f"rm -rf {FOLDER} ~ /tmp/* /work/* 2>/dev/null")'),
        ('import os\n'
         'os.chmod(CANARY, 0)'),
        ('import os\n'
         'os.symlink("/etc/passwd", CANARY + ".link")'),
        ('import pathlib\n'
         'pathlib.Path(CANARY).unlink()'),
        ('import os\n'
         'for r, d, f in os.walk(FOLDER, topdown=False):\n'
         '  [os.remove(r + "/" + x) for x in f]'),
        ('import ctypes\n'
         'ctypes.CDLL(None).unlink(CANARY.encode())'),
        'open(FOLDER + "/new", "w").write("x")',
        ('import os\n'
         'os.mkdir(FOLDER + "/folder")'),
        ('import os\n'
         'os.chroot(".")\n'
         'for _ in range(50): os.chdir("..")\n'
         'os.chroot(".")\n'
         'os.remove(CANARY)'),
    ],
    'socket': [
        ('import socket\n'
         'socket.create_connection(("127.0.0.1", PORT), 2).send(b"x")'),
        ('import socket\n'
         'socket.create_connection(("localhost", PORT), 2)'),
        ('import socket\n'
         's = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n'
         's.sendto(b"x", ("127.0.0.1", PORT))'),
        ('import socket\n'
         's = socket.socket(socket.AF_UNIX)\n'
         's.connect(UNIX)\n'
         's.send(b"x")'),
        ('import socket\n'
         's = socket.socket(socket.AF_UNIX)\n'
         's.connect("\\0" + ABSTRACT)\n'
         's.send(b"x")'),
        ('import urllib.request\n'
         'urllib.request.urlopen(f"http://127.0.0.1:{PORT}/", timeout=2)'),
        ('import socket\n'
         's = socket.socket()\n'
         's.bind(("127.0.0.1", 0))\n'
         's.listen()\n'
         's.accept()'),
        ('import os\n'
         'os.system(f"exec 3<>/dev/tcp/127.0.0.1/{PORT}; echo x >&3")'),
        ('import asyncio\n'
         'asyncio.run(asyncio.open_connection("127.0.0.1", PORT))'),
    ],
    'environment': [
        ('import os\n'
         'leak(str(os.environ))'),
        ('import os\n'
         'leak(open(f"/proc/{os.getppid()}/environ").read())'),
        ('import glob\n'
         'for p in glob.glob("/proc/*/environ"):\n'
         '  try: leak(open(p).read())\n'
         '  except OSError: pass'),
        'leak(open("/proc/1/environ").read())',
        'leak(open(SECRETS).read())',
        ('import os\n'
         'leak(open(f"/proc/{PARENT}/environ").read())'),
        ('import os\n'
         'leak(os.popen("env; cat /proc/*/environ").read())'),
        'leak(open("/proc/self/environ").read())',
        ('import os\n'
         'for p in range(2, 64):\n'
         '  try: leak(os.read(p, 10**6).decode())\n'
         '  except OSError: pass'),
        'leak(open(f"/proc/{PARENT}/mem", "rb").read(100).decode())',
    ],
    'gigabyte': [
        'open("/tmp/big", "wb").write(b"0" * 2**30)',
        ('f = open(FOLDER + "/big", "wb")\n'
         'for _ in range(1024): f.write(b"0" * 2**20)'),
        ('f = open("/tmp/big", "wb")\n'
         'for _ in range(1024): f.write(b"0" * 2**20)'),
        ('for i in range(1024):\n'
         '  with open(f"/tmp/{i}", "wb") as f: f.write(b"0" * 2**20)'),
        'for i in range(10**6): open(f"/tmp/{i}", "w").close()',
        ('import sys\n'
         'for _ in range(1024): sys.stdout.write("0" * 2**20)'),
        ('import os\n'
         'for _ in range(1024): os.write(3, b"0" * 2**20)'),
        ('import sys\n'
         'while True: sys.stderr.write("0" * 2**20)'),
        'open("/dev/shm/big", "wb").write(b"0" * 2**30)',
        ('import os\n'
         'os.posix_fallocate(os.open("/tmp/b", os.O_CREAT | os.O_RDWR), 0, 2**30)'),
        ('import tempfile\n'
         'f = tempfile.TemporaryFile()\n'
         'f.seek(2**30)\n'
         'f.write(b"0")\n'
         'while True: f.write(b"0" * 2**20)'),
    ],
    'kill': [
        ('import os\n'
         'os.kill(os.getppid(), 9)'),
        ('import os\n'
         'os.kill(PARENT, 9)'),
        ('import os\n'
         'os.kill(-1, 9)'),
        ('import os\n'
         'os.killpg(0, 9)'),
        ('import os\n'
         'for p in range(2, 10**5):\n'
         '  try: os.kill(p, 9)\n'
         '  except OSError: pass'),
        ('import os\n'
         'os.kill(1, 9)'),
        ('import os\n'
         'os.system("kill -9 -1; pkill -9 python; killall -9 python")'),
        ('import os\n'
         'os.killpg(os.getpgid(os.getppid()), 15)'),
        ('import os, signal\n'
         'signal.pidfd_send_signal(os.pidfd_open(PARENT), 9)'),
        ('import ctypes\n'
         'ctypes.CDLL(None).ptrace(16, PARENT, 0, 0)'),
        ('import os\n'
         'os.setpriority(os.PRIO_PROCESS, PARENT, 19)'),
        ('import resource\n'
         'resource.prlimit(PARENT, resource.RLIMIT_CPU, (1, 1))'),
    ],
    'escape': [
        ('import ctypes\n'
         'c = ctypes.CDLL(None)\n'
         'c.unshare(0x10000000)\n'
         'c.mount(b"/", b"/tmp", None, 4096, None)\n'
         'import os\n'
         'os.remove("/tmp" + CANARY)'),
        ('import ctypes\n'
         'c = ctypes.CDLL(None)\n'
         'c.umount2(b"/proc", 2)\n'
         'c.umount2(b"/", 2)\n'
         'import os\n'
         'os.remove(CANARY)'),
        ('import os\n'
         'os.setuid(0)\n'
         'os.remove(CANARY)'),
        ('import os\n'
         'fd = os.open("/proc/1/root", os.O_RDONLY)\n'
         'os.chdir(fd)\n'
         'os.remove("." + CANARY)'),
        ('import os\n'
         'os.mknod("/tmp/sda", 0o60666, os.makedev(254, 0))\n'
         'open("/tmp/sda", "wb").write(b"0" * 512)'),
        'open("/proc/sys/kernel/core_pattern", "w").write("|/tmp/x")',
        'open("/proc/sysrq-trigger", "w").write("b")',
        ('import ctypes\n'
         'ctypes.CDLL(None).reboot(0x1234567)'),
        ('import sys\n'
         'open(sys.executable, "ab").write(b"x")'),
        ('import ctypes\n'
         'ctypes.CDLL(None).setns(0, 0)'),
        ('import os, sys\n'
         'open(os.__file__, "a").write("x")'),
        ('import ctypes, os\n'
         'ctypes.CDLL(None).prctl(1, 0)\n'
         'os.setsid() if os.fork() else None\n'
         'os.fork()\n'
         'import time\n'
         'time.sleep(300)'),
        ('import ctypes\n'
         'ctypes.CDLL(None).syscall(250, 0, -3, 0, 0, 0)\n'
         'import os\n'
         'os.remove(CANARY)'),
    ],
}  # fmt: skip


def programs(count: int = 100) -> list[tuple[str, str]]:
  """(family, program): the families in turn; those that are wanting do their harm not when loaded but when called."""
  longest = max(map(len, FAMILIES.values()))
  at_once = [(family, kind[i]) for i in range(longest) for family, kind in FAMILIES.items() if i < len(kind)]
  called = [(family, 'def add(a, b):\n' + ''.join(f'  {line}\n' for line in program.split('\n')))
            for family, program in at_once]
  return (at_once + called)[:count]
