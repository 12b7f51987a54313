"""The calls of Linux that `sandbox` needs and the standard library lacks: namespaces, mounts, filters of calls."""

import ctypes
import os
import platform
import struct
import sys

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18)
# Flags of a file system that a mount in a user namespace must keep; statvfs gives them under the same numbers.
KEPT_FLAGS = MS_NOSUID | MS_NODEV | MS_NOEXEC | 1024 | 2048
RELATIME_STATVFS, MS_RELATIME = 4096, 1 << 21
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38

_ERRNO = 0x00050000
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06  # words of the filter's machine
_EPERM, _ENOSYS = 1, 38
_CLONE_THREAD = 0x10000
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit number and system calls by machine: numbers of x86-64 and arm64 from the kernel's tables.
_NEW = {  # the same everywhere
    'pidfd_send_signal': 424, 'io_uring_setup': 425, 'open_tree': 428, 'move_mount': 429, 'fsopen': 430,
    'pidfd_open': 434, 'openat2': 437, 'pidfd_getfd': 438, 'mount_setattr': 442}
_TABLES = {
    'x86_64': (0xC000003E, _NEW | {
        'socket': 41, 'socketpair': 53, 'kill': 62, 'tkill': 200, 'tgkill': 234, 'ptrace': 101, 'fork': 57, 'vfork': 58,
        'rename': 82, 'mkdir': 83, 'rmdir': 84, 'creat': 85, 'link': 86, 'unlink': 87, 'symlink': 88, 'chmod': 90,
        'fchmod': 91, 'chown': 92, 'fchown': 93, 'lchown': 94, 'truncate': 76, 'ftruncate': 77, 'mknod': 133,
        'unlinkat': 263, 'mkdirat': 258, 'mknodat': 259, 'fchownat': 260, 'renameat': 264, 'linkat': 265,
        'symlinkat': 266, 'fchmodat': 268, 'renameat2': 316, 'utime': 132, 'utimes': 235, 'utimensat': 280,
        'setxattr': 188, 'lsetxattr': 189, 'fsetxattr': 190, 'process_vm_readv': 310, 'process_vm_writev': 311,
        'mount': 165, 'umount2': 166, 'unshare': 272, 'setns': 308, 'bpf': 321, 'keyctl': 250, 'shmget': 29,
        'msgget': 68, 'semget': 64, 'mq_open': 240, 'setpriority': 141, 'prlimit64': 302, 'rt_sigqueueinfo': 129,
        'rt_tgsigqueueinfo': 297}, {'open': 2, 'openat': 257, 'clone': 56, 'clone3': 435, 'prctl': 157}),
    'aarch64': (0xC00000B7, _NEW | {
        'socket': 198, 'socketpair': 199, 'kill': 129, 'tkill': 130, 'tgkill': 131, 'ptrace': 117, 'mkdirat': 34,
        'mknodat': 33, 'unlinkat': 35, 'symlinkat': 36, 'linkat': 37, 'renameat': 38, 'renameat2': 276, 'truncate': 45,
        'ftruncate': 46, 'fchmod': 52, 'fchmodat': 53, 'fchownat': 54, 'fchown': 55, 'utimensat': 88, 'setxattr': 5,
        'lsetxattr': 6, 'fsetxattr': 7, 'process_vm_readv': 270, 'process_vm_writev': 271, 'mount': 40, 'umount2': 39,
        'unshare': 97, 'setns': 268, 'bpf': 280, 'keyctl': 219, 'shmget': 194, 'msgget': 186, 'semget': 190,
        'mq_open': 180, 'setpriority': 140, 'prlimit64': 261, 'rt_sigqueueinfo': 138, 'rt_tgsigqueueinfo': 240},
        {'openat': 56, 'clone': 220, 'clone3': 435, 'prctl': 167}),
}  # fmt: skip
MACHINE = platform.machine() if sys.platform == 'linux' and platform.machine() in _TABLES else None


def _call(name: str, *arguments) -> None:
  """Raises OSError with the call's name if it fails."""
  libc = ctypes.CDLL(None, use_errno=True)
  if getattr(libc, name)(*arguments) != 0:
    number = ctypes.get_errno()
    raise OSError(number, f'{name}: {os.strerror(number)}')


def unshare(flags: int) -> None:
  """Moves this process (for processes: its children) into namespaces of its own."""
  _call('unshare', ctypes.c_int(flags))


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, options: str | None = None) -> None:
  """mount(2)."""
  _call('mount', source.encode(), target.encode(), kind and kind.encode(), ctypes.c_ulong(flags),
        options and options.encode())


def bind_read_only(source: str, target: str) -> None:
  """Shows a folder or file at another place, not to be written there; no devices, no set-user-id."""
  mount(source, target, None, MS_BIND | MS_REC)
  had = os.statvfs(target).f_flag
  kept = had & KEPT_FLAGS | (MS_RELATIME if had & RELATIME_STATVFS else 0)
  mount('none', target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | kept)


def die_with_parent(parent: int) -> None:
  """Asks for SIGKILL when the parent ends. To be called after the last change of user id, which takes it back."""
  _call('prctl', _PR_SET_PDEATHSIG, ctypes.c_ulong(9), 0, 0, 0)
  if os.getppid() not in (parent, 0):  # 0: the parent is outside of this process's namespace
    os._exit(1)


def gain_no_privileges() -> None:
  _call('prctl', _PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), 0, 0, 0)


def drop_capabilities() -> None:
  """Root's rights beyond those of a user, for good; what is exec'ed cannot have them either."""
  libc = ctypes.CDLL(None)
  for capability in range(64):  # those that the kernel does not know fail, and are not there to drop
    libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0)


def filter_program() -> bytes:
  """Instructions of a seccomp filter that fails, with EPERM, what reaches beyond the process; see `sandbox`."""
  audit, denied, special = _TABLES[MACHINE]
  low = 16  # offset of the first argument's low word; each argument has 8 bytes

  def deny(error: int = _EPERM) -> tuple:
    return (_RETURN, 0, 0, _ERRNO | error)
  code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, audit), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
  if MACHINE == 'x86_64':
    code += [(0x35, 0, 1, 0x40000000), deny()]  # the second table of calls, x32
  for number in sorted(denied.values()):
    code += [(_EQUAL, 0, 1, number), deny()]
  code += [(_EQUAL, 0, 1, special['clone3']), deny(_ENOSYS)]  # its flags cannot be seen: libc goes back to clone
  code += [(_EQUAL, 0, 4, special['clone']), (_LOAD, 0, 0, low), (_ANY_BIT, 1, 0, _CLONE_THREAD), deny(),
           (_RETURN, 0, 0, _ALLOW)]
  code += [(_EQUAL, 0, 4, special['prctl']), (_LOAD, 0, 0, low), (_EQUAL, 0, 1, _PR_SET_PDEATHSIG), deny(),
           (_RETURN, 0, 0, _ALLOW)]
  for name, argument in (('open', 1), ('openat', 2)):
    if name in special:
      code += [(_EQUAL, 0, 4, special[name]), (_LOAD, 0, 0, low + 8 * argument), (_ANY_BIT, 0, 1, _WRITING), deny(),
               (_RETURN, 0, 0, _ALLOW)]
  code.append((_RETURN, 0, 0, _ALLOW))
  return b''.join(struct.pack('HBBI', *word) for word in code)


def apply_filter(program: bytes) -> None:
  """Puts a filter on this process for good; what it starts by exec has it too."""
  class Program(ctypes.Structure):
    _fields_ = [('length', ctypes.c_ushort), ('words', ctypes.c_void_p)]
  words = ctypes.create_string_buffer(program, len(program))
  given = Program(len(program) // 8, ctypes.cast(words, ctypes.c_void_p))
  _call('prctl', _PR_SET_SECCOMP, ctypes.c_ulong(2), ctypes.byref(given), 0, 0)
