"""The planner: HLO read with its loops, collectives costed on the torus, small programs with known answers."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest

from moe_rl import plan
from moe_rl.main import load_experiment
from moe_rl.planner import count, hlo, programs, suggest
from moe_rl.planner.compile import compile_all, needed_bytes, read_buffers
from moe_rl.planner.cost import HOP, Network
from moe_rl.planner.count import Collective, Work
from moe_rl.planner.topologies import parse
from moe_rl.runtime.mesh import AXES

LOOPS = """HloModule m, num_partitions=8
%body (p: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %p = (s32[], f32[4,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,4]{1,0} get-tuple-element(%p), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %y = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %z = f32[4,4]{1,0} all-reduce(%y), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%sum
  ROOT %t = (s32[], f32[4,4]{1,0}) tuple(%next, %z)
}
%condition (q: (s32[], f32[4,4])) -> pred[] {
  %q = (s32[], f32[4,4]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %end = s32[] constant(9)
  ROOT %less = pred[] compare(%j, %end), direction=LT
}
ENTRY %main (a: f32[4,4]) -> f32[4,4] {
  %a = f32[4,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,4]{1,0}) tuple(%zero, %a)
  %w = (s32[], f32[4,4]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %r = f32[4,4]{1,0} get-tuple-element(%w), index=1
}
"""


def test_a_loop_is_counted_as_often_as_it_goes_round():
  work = count.count(hlo.parse(LOOPS))
  assert [loop.trips for loop in work.loops] == [hlo.Trips(5, 'known')]  # 0, 2, 4, 6, 8
  total = work.total()
  assert total.flops == 5 * 2 * 4**3
  (c, n), = total.collectives.items()
  assert (c.kind, n, c.groups) == ('all-reduce', 5, ((0, 2, 4, 6), (1, 3, 5, 7)))
  assert total.received == 5 * 2 * 64 * 3 / 4


def test_elements_of_tuples_are_read_as_either_jaxlib_writes_them():
  """0.10 has an instruction for each, 0.12 a mark at the operand; a tuple in a tuple keeps its own elements."""
  short = LOOPS
  for name, element in (('i', 'p#0'), ('x', 'p#1'), ('j', 'q#0')):
    short = re.sub(rf'  %{name} = .*get-tuple-element.*\n', '', short).replace(f'%{name},', f'%{element},')
    short = short.replace(f'%{name})', f'%{element})')
  short = short.replace('get-tuple-element(%w), index=1', 'bitcast(%w#1)')
  assert short.count('#') == 5 and 'get-tuple-element' not in short
  assert count.count(hlo.parse(short)).total() == count.count(hlo.parse(LOOPS)).total()
  module = hlo.parse('HloModule m, num_partitions=1\n\nENTRY %e (a: ((f32[2], s8[3]), f32[5])) -> s8[3] {\n'
                     '  %a = ((f32[2]{0}, s8[3]{0}), f32[5]{0}) parameter(0)\n  ROOT %c = s8[3]{0} copy(%a#0#1)\n}\n')
  assert module.entry.operand(module.entry.root, 0).shapes == (hlo.Shape('s8', (3,)),)


def test_every_collective_counts_once_where_it_stands_or_is_offloaded_to():
  """Two of shard_map, which share channel 1; one that two fusions have written in each; one on the SparseCores."""
  work = count.count(hlo.parse("""HloModule m, num_partitions=4
%fused.1 (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %a = f32[8]{0} all-reduce(%p), channel_id=7, to_apply=%sum
}
%fused.2 (p2: f32[8]) -> f32[8] {
  %p2 = f32[8]{0} parameter(0)
  ROOT %a2 = f32[8]{0} all-reduce(%p2), channel_id=7, to_apply=%sum
}
%called.1 (p3: f32[8]) -> f32[32] {
  %p3 = f32[8]{0} parameter(0)
  ROOT %g = f32[32]{0} all-gather(%p3), channel_id=9, dimensions={0}
}, execution_thread="sparsecore"

%async.1 (p4: f32[8]) -> f32[32] {
  %p4 = f32[8]{0} parameter(0)
  ROOT %c = f32[32]{0} custom-call(%p4), custom_call_target="offload", called_computations={%called.1}
}, execution_thread="sparsecore"

ENTRY %main (x: f32[8]) -> f32[32] {
  %x = f32[8]{0} parameter(0)
  %y = f32[8]{0} all-to-all(%x), channel_id=1, dimensions={0}
  %z = f32[8]{0} all-to-all(%y), channel_id=1, dimensions={0}
  %u = f32[8]{0} fusion(%z), kind=kLoop, calls=%fused.1
  %v = f32[8]{0} fusion(%z), kind=kLoop, calls=%fused.2
  %s = ((f32[8]{0}), f32[32]{0}) async-start(%z), async_execution_thread="sparsecore", calls=%async.1
  ROOT %d = f32[32]{0} async-done(%s)
}
""")).total()
  kinds = {}
  for c, n in work.collectives.items():
    kinds[c.kind] = kinds.get(c.kind, 0) + n
  assert kinds == {'all-to-all': 2, 'all-reduce': 1, 'all-gather': 1}
  assert work.received == 2 * 32 * 3 / 4 + 2 * 32 * 3 / 4 + 128 * 3 / 4


def test_a_fusion_reads_what_it_takes_through_the_fusions_inside():
  """Seven layers' weights, of which one is taken after all are moved; tokens, whole, that an inner fusion renames;
  an update of one cell, in place, and of one that is moved first and so is read whole."""
  work = count.count(hlo.parse("""HloModule m, num_partitions=1
%moved (a: bf16[7,32,64]) -> bf16[7,32,64] {
  %a = bf16[7,32,64]{1,2,0} parameter(0)
  ROOT %copy.1 = bf16[7,32,64]{2,1,0} copy(%a)
}
%layer (b: bf16[7,32,64], i: s32[]) -> bf16[32,64] {
  %b = bf16[7,32,64]{1,2,0} parameter(0)
  %all = bf16[7,32,64]{2,1,0} fusion(%b), kind=kLoop, calls=%moved
  %i = s32[]{:S(6)} parameter(1)
  %o = s32[] constant(0)
  %one = bf16[1,32,64]{2,1,0} dynamic-slice(%all, %i, %o, %o), dynamic_slice_sizes={1,32,64}
  ROOT %flat = bf16[32,64]{1,0} bitcast(%one)
}
%renamed (c: bf16[1,8,32]) -> bf16[8,32] {
  %c = bf16[1,8,32]{2,1,0} parameter(0)
  ROOT %same = bf16[8,32]{1,0} bitcast(%c)
}
%product (x: bf16[1,8,32], w: bf16[7,32,64], j: s32[]) -> bf16[8,64] {
  %x = bf16[1,8,32]{2,1,0} parameter(0)
  %left = bf16[8,32]{1,0} fusion(%x), kind=kLoop, calls=%renamed
  %w = bf16[7,32,64]{1,2,0} parameter(1)
  %j = s32[]{:S(6)} parameter(2)
  %right = bf16[32,64]{1,0} fusion(%w, %j), kind=kLoop, calls=%layer
  ROOT %dot.1 = bf16[8,64]{1,0} dot(%left, %right), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%written (d: f32[9,16], e: f32[1,16], k: s32[]) -> f32[9,16] {
  %d = f32[9,16]{1,0} parameter(0)
  %e = f32[1,16]{1,0} parameter(1)
  %k = s32[] parameter(2)
  ROOT %u = f32[9,16]{1,0} dynamic-update-slice(%d, %e, %k, %k)
}
%moved_first (d2: f32[9,16], e2: f32[1,16], k2: s32[]) -> f32[9,16] {
  %d2 = f32[9,16]{0,1} parameter(0)
  %e2 = f32[1,16]{1,0} parameter(1)
  %k2 = s32[] parameter(2)
  %c2 = f32[9,16]{1,0} copy(%d2)
  ROOT %u2 = f32[9,16]{1,0} dynamic-update-slice(%c2, %e2, %k2, %k2)
}
ENTRY %main (p: bf16[1,8,32], q: bf16[7,32,64], l: s32[], f: f32[9,16], g: f32[1,16]) -> f32[9,16] {
  %p = bf16[1,8,32]{2,1,0} parameter(0)
  %q = bf16[7,32,64]{1,2,0} parameter(1)
  %l = s32[]{:S(6)} parameter(2)
  %f = f32[9,16]{1,0} parameter(3)
  %g = f32[1,16]{1,0} parameter(4)
  %y = bf16[8,64]{1,0} fusion(%p, %q, %l), kind=kOutput, calls=%product
  %v = f32[9,16]{1,0} fusion(%f, %g, %l), kind=kLoop, calls=%written
  ROOT %z = f32[9,16]{1,0} fusion(%v, %g, %l), kind=kLoop, calls=%moved_first
}
"""))
  assert work.flops == 2 * 8 * 32 * 64
  product = 2 * (8 * 32 + 32 * 64 + 8 * 64)
  assert work.hbm == product + 4 * (16 + 16) + 4 * (9 * 16 + 16 + 16)


@pytest.mark.parametrize('text, wanted', [
  ('replica_groups={{0,1},{2,3}}', ((0, 1), (2, 3))),
  ('replica_groups=[2,2]<=[4]', ((0, 1), (2, 3))),
  ('replica_groups=[2,2]<=[2,2]T(1,0)', ((0, 2), (1, 3))),
  ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
  ("replica_groups=mesh['a'=4] {'a':(2)2}", ((0, 1), (2, 3))),
  ('', ((0, 1, 2, 3),))])
def test_groups_are_read_in_every_form(text, wanted):
  assert hlo.groups(text, 4) == wanted


def line(kind: str, nbytes: float, members) -> Collective:
  return Collective(kind, nbytes, nbytes, (tuple(members),), '')


def places(topology):
  import itertools
  return [(*p, 0) for p in itertools.product(*map(range, topology.shape))]


def test_collectives_take_the_torus_time():
  """v5p:4x4x4, all rings, 90e9 bytes/s a link and direction; a GB each; group along the last dimension: 4 in a ring."""
  topology = parse('v5p:4x4x4')
  network = Network(topology, places(topology))
  ring, whole, pair = range(4), range(64), (0, 1)

  def seconds(kind, group):
    return network.seconds_of(line(kind, 1e9, group))
  assert seconds('all-gather', ring) == pytest.approx(0.75e9 / 180e9 + 2 * HOP)  # in on two links
  assert seconds('all-reduce', ring) == pytest.approx(1.5e9 / 180e9 + 4 * HOP)
  assert seconds('all-gather', whole) == pytest.approx(63 / 64 * 1e9 / 540e9 + 6 * HOP)  # three rings at once
  assert seconds('all-gather', pair) == pytest.approx(0.5e9 / 90e9 + HOP)  # neighbours: one link
  assert seconds('all-to-all', ring) == pytest.approx(0.5e9 / 90e9 + 2 * HOP)  # k / 8 of the bytes on a link
  permute = Collective('collective-permute', 1e9, 1e9, ((0, 1), (1, 2), (2, 3), (3, 0)), '')
  assert network.seconds_of(permute) == pytest.approx(1e9 / 90e9 + HOP)
  far = Collective('collective-permute', 1e9, 1e9, ((0, 2), (1, 3)), '')  # both cross the link from 1 to 2
  assert network.seconds_of(far) == pytest.approx(2e9 / 90e9 + 2 * HOP)


def test_slices_smaller_than_a_cube_are_lines():
  topology = parse('v5p:2x2x4')
  assert Network(topology, places(topology)).seconds_of(line('all-gather', 1e9, range(4))) == pytest.approx(
    0.75e9 / 90e9 + 3 * HOP)


def test_compute_and_hbm_take_their_rates():
  topology = parse('tpu7x:2x2x1')  # two devices a chip: each has half
  s = Network(topology, []).seconds(Work(flops=2307e12 / 2, hbm=7380e9))
  assert (s.compute, s.hbm, s.overlapped, s.apart, s.bound) == (1, 2, 2, 2, 'hbm')


@pytest.mark.parametrize('text, near', [('v5q:2x2', 'v5p'), ('v5p:8x8', 'v5p:8x8x8'), ('v5e:3x3', 'v5e:2x4'),
  ('', '--topology is empty: name the slice')])
def test_an_unknown_topology_names_those_that_work(text, near):
  with pytest.raises(ValueError, match=near):
    parse(text)


def test_what_the_compiler_says_is_read():
  assert needed_bytes('the total memory required for HLO temporaries (256.00G) exceeds available HBM') == 256 * 2**30
  memory = read_buffers('allocation 0: size 64, page 0, parameter 0, shape |f32[16]| at {}, maybe-live-out:\n'
                        'allocation 1: size 32, page 0, preallocated-temp:\n'
                        'allocation 2: size 9, color 1, page 0, preallocated-temp:')
  assert (memory['arguments'], memory['aliased'], memory['temporaries']) == (64, 64, 32)


needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason="libtpu is not installed: pip install '.[plan]'")


@pytest.fixture(scope='module')
def compiled():
  done = compile_all(parse('v5e:2x2'), 'tests.planner_programs:make', {})
  return {p.name: p for p in done.programs}


def work(compiled, name, **rounds):
  return count.count(hlo.parse(compiled[name].hlo)).total(rounds)


@needs_libtpu
def test_small_programs_have_their_known_work(compiled):
  gathered = work(compiled, 'gathered')
  assert gathered.flops == 2 * 1024 * 512 * 256
  (c, n), = gathered.collectives.items()
  assert (c.kind, n, c.received) == ('all-gather', 1, 512 * 512 * 2)  # the other's half
  (c, n), = work(compiled, 'summed').collectives.items()
  assert (c.kind, n, c.received) == ('all-reduce', 7, 256 * 256 * 2)
  assert work(compiled, 'nested').flops == 15 * 2 * 512**3
  (c, n), = work(compiled, 'exchanged').collectives.items()
  assert (c.kind, n, c.received) == ('all-to-all', 1, 256 * 512 * 2 / 2)
  # Two squarings a microbatch, in a loop of its own inside: each goes round as often as is said of its name.
  assert work(compiled, 'of length').flops == 2 * 512**3
  assert work(compiled, 'of length', microbatches=10).flops == 10 * 2 * 512**3
  assert work(compiled, 'of length', microbatches=10, exchanges=3).flops == 30 * 2 * 512**3
  names = [x.name for x in count.count(hlo.parse(compiled['of length'].hlo)).open_loops()]
  assert names == ['microbatches', 'exchanges']


@needs_libtpu
def test_a_scan_over_layers_reads_each_layers_weights_once(compiled):
  """12 layers of 1,024 x 2,048 and back, 8.4 MB each, turned over in the product: as they lie, they are read; the whole
  stack in each layer would be 12 times as much. A few percent beside them are tokens."""
  weights = 12 * 2 * 1024 * 2048 * 2
  assert weights <= work(compiled, 'stacked').hbm < 1.05 * weights


@needs_libtpu
@pytest.mark.parametrize('topology', ['v5e:2x2', 'tpu7x:2x2x1'])
def test_decode_copies_no_cells_to_write_one(topology):
  """100 steps of 8 layers of 18.9 MB of cells: each layer's are read twice, and scores may go to HBM and back; all
  layers' cells copied there and back in each layer would be 32 times a layer's."""
  program, = compile_all(parse(topology), 'tests.planner_programs:decoding', {}).programs
  cells = 4 * 4096 * 576 * 2
  total = count.count(hlo.parse(program.hlo)).total()
  assert 2 * cells <= total.hbm / 800 < 4 * cells


@needs_libtpu
def test_code_of_the_attention_kernel_fits_the_chips_vector_memory():
  """Which the compiler finds out as it generates code: HLO and HBM say nothing of it."""
  program, = compile_all(parse('v5p:2x2x1'), 'tests.planner_programs:attending', {}).programs
  assert not program.error and not program.cut and program.memory['code'] > 0, program.error


@needs_libtpu
def test_memory_is_the_compilers_and_what_does_not_fit_is_told(compiled):
  nested = compiled['nested']
  assert nested.memory['arguments'] == nested.memory['outputs'] == 512 * 512 * 2
  assert nested.resident == 512 * 1024 * 2 and nested.peak > nested.resident
  big = compiled['too big']
  assert big.error and big.needed >= 32 * 2**30


@needs_libtpu
@pytest.mark.parametrize('arguments, wanted', [
  (['--topology=v9:2x2'], 'no TPU generation'),
  ([], '--topology is empty'),
  (['--topology=v5e:2x2', '--config.mesh.tensor=3'], "'tensor': 3}): take divisors of 4"),
  (['--topology=v5e:2x2', '--only=reward'], '--only=reward: no such program; there are init, weights to sampler'),
  (['--topology=v5e:2x2', '--json=nowhere/plan.json'], '--json=nowhere/plan.json: nowhere is no folder'),
  (['--topology=v5e:2x2', '--mean_tokens=100000'], '--mean_tokens=100000')])
def test_the_command_refuses(arguments, wanted):
  done = subprocess.run([sys.executable, '-m', 'moe_rl.plan', '--config=experiments/r1_zero.py', *arguments],
                        capture_output=True, text=True, check=False)
  assert done.returncode == 2 and wanted in done.stderr and 'Traceback' not in done.stderr


@pytest.mark.parametrize('given, wanted', [
  (['--config=experiments/r1_zero.py:v3_671b', '--topology=v5p:8x8x16', '--config.seed=1'],
   ['--config=experiments/r1_zero.py:v3_671b@v5p:8x8x16', '--topology=v5p:8x8x16', '--config.seed=1']),
  (['--topology', 'v5p:8x8x8', '--config', 'experiments/pretrain.py:v3_671b'],
   ['--topology', 'v5p:8x8x8', '--config', 'experiments/pretrain.py:v3_671b@v5p:8x8x8']),
  (['--config=experiments/r1_zero.py:v3_671b@v5p:8x8x16', '--topology=tpu7x:4x8x8'], None),
  (['--config=experiments/sft.py:small', '--topology=v5p:8x8x16'], None),
  (['--config=experiments/r1_zero.py:v3_671b', '--topology=v5p:4x4x8'], None)])
def test_a_preset_is_planned_with_its_table_of_the_slice(given, wanted, capsys):
  assert plan.with_slice(['plan', *given]) == ['plan', *(wanted or given)]
  said = capsys.readouterr().err
  assert ('has it for this slice' in said) == bool(wanted)
  assert ('it has v5p:8x8x16, tpu7x:4x8x8), so the mesh is config.mesh' in said) == ('--topology=v5p:4x4x8' in given)


@pytest.mark.parametrize('topology, changes, wanted', [
  ('v5e:2x4', {'mesh.tensor': 8}, r'config.mesh.tensor \(8\) does not divide config.model.heads \(4\): take a divisor'),
  ('v5e:4x4', {'mesh.expert': 16}, r'config.mesh.expert x tensor \(16\) does not divide config.model.experts \(8\)'),
  ('v5e:8x8', {}, r'prompts_per_step 32 is not a multiple of the mesh \(data x fsdp x expert\) 64: set it to 64'),
  ('v5e:2x2', {'stage': 'evaluate'}, "'evaluate' cannot be planned: give an experiment of one stage of pretrain, sft")])
def test_a_mesh_that_does_not_divide_is_refused_before_anything_is_compiled(topology, changes, wanted, monkeypatch):
  monkeypatch.setattr('moe_rl.planner.compile.compile_all', None)
  config = load_experiment('experiments/r1_zero.py')
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=wanted):
    plan.plan(config, parse(topology))


@needs_libtpu
def test_a_step_of_671b_with_fewer_layers_fits_and_sends_a_token_once_to_each_of_four_devices():
  """V3's widths on 512 chips, one dense layer and one of experts, 4 x 4,096 tokens a chip."""
  config, topology = load_experiment('experiments/pretrain.py', 'v3_671b@v5p:8x8x8'), parse('v5p:8x8x8')
  config.model.update(dict(layers=2, dense_layers=1, mtp_layers=0))
  made = plan.plan(config, topology, only=['pretrain update'], patience=1.0)
  update, = made['programs']
  assert made['fits'] and 5 * 2**30 < update['peak_bytes'] < 60 * 2**30
  # There and back forward; twice there and once back backward; gates and picks beside them in rows of 256 numbers.
  sent = 4 * 4096 * 4 * 2 * 7 / 8
  exchanged = update['collectives']['ragged-all-to-all']
  assert exchanged['count'] == 8 and exchanged['received'] == sent * (5 * 7168 + 3 * 256)
  # One step of 2,048 rows: what is computed above the model's own FLOPs is a second forward pass of attention and dense
  # layers, and places of the experts' buffers that an even load leaves empty.
  assert 1.0 < update['flops'] * topology.devices / update['useful_flops'] < 1.4


def plan_command(*arguments: str, before: str = '', experiment: str = 'experiments/r1_zero.py'):
  """`python -m moe_rl.plan`, by default on the tiny experiment, in a process where `before` has run."""
  code = f'{before}\nimport runpy\nrunpy.run_module("moe_rl.plan", run_name="__main__", alter_sys=True)'
  return subprocess.run([sys.executable, '-c', code, f'--config={experiment}', *arguments],
                        capture_output=True, text=True, check=False)


@needs_libtpu
def test_the_command_plans_every_program_of_a_small_run(tmp_path):
  """`small` of three layers on four chips, from the command line to the JSON."""
  changes = {'model.layers': 3, 'mesh.data': 1, 'mesh.expert': 4, 'rl.prompts_per_step': 64, 'rl.minibatches': 2,
             'sampling.max_new_tokens': 1024, 'sampling.max_prompt_tokens': 128, 'eval.problems': 64}
  done = plan_command('--topology=v5e:2x2', '--patience=1', f'--json={tmp_path / "plan.json"}',
                      *(f'--config.{key}={value}' for key, value in changes.items()),
                      experiment='experiments/r1_zero.py:small')
  assert done.returncode == 0, done.stderr
  whole = json.loads((tmp_path / 'plan.json').read_text())
  assert whole['fits'] and whole['chips'] == 4 and whole['mesh']['expert'] == 4
  made = {p['name']: p for p in whole['programs']}
  assert list(made) == ['init', 'weights to sampler', 'rollout', 'evaluation', 'GRPO update']
  for name, p in made.items():
    assert p['fits'] and not p['error'] and f'{name}: fits' in done.stdout
    assert p['seconds']['overlapped'] <= p['seconds']['apart']
    assert p['memory']['arguments'] < p['peak_bytes'] < whole['capacity_bytes']
  loops = [{x['name'] for x in made[name]['loops_of_data_length']} for name in ('rollout', 'GRPO update')]
  assert 'decode' in loops[0] and 'microbatches' in loops[1]
  assert made['GRPO update']['collectives']['ragged-all-to-all']['count'] > 0
  # A step's rollout and its updates, and a share of an evaluation.
  seconds = sum(p['runs_a_step'] * p['seconds']['overlapped'] for p in made.values())
  assert abs(whole['run']['overlapped']['seconds_per_step'] / seconds - 1) < 1e-9 and whole['run']['steps'] == 650
  # 256 samples a chip of 1,024 cells of 160 numbers in three layers: read where they lie, with no second copy of all of
  # them, or of two layers' worth, beside them.
  cache = 256 * 1024 * 160 * 3 * 2
  assert cache < made['rollout']['memory']['temporaries'] < 1.5 * cache


@needs_libtpu
def test_what_does_not_fit_ends_with_status_1_and_the_remedy():
  done = plan_command('--topology=v5e:1x1', '--only=init', '--config.model.vocab_size=20000000')  # 10 GB, five times
  assert done.returncode == 1 and 'init: DOES NOT FIT' in done.stdout
  assert 'GiB a device more than there is: take more chips' in done.stderr


def test_without_the_compiler_it_says_what_to_install():
  done = plan_command('--topology=v5e:1x1', before='import sys; sys.modules["libtpu"] = None')
  assert done.returncode == 2 and "libtpu) is not installed: pip install 'moe_rl[plan]'" in done.stderr
  assert 'Traceback' not in done.stderr


@needs_libtpu
def test_a_program_that_kills_its_process_costs_itself_alone():
  deadly, harmless = compile_all(parse('v5e:2x2'), 'tests.planner_programs:deadly', {}).programs
  assert deadly.error.startswith('the compiler ended with status 9') and 'out of luck' in deadly.error
  assert not deadly.memory and harmless.memory and not harmless.error


@needs_libtpu
def test_a_process_that_makes_no_programs_is_told_with_its_last_words():
  with pytest.raises(ValueError, match='ended with status 7. Its last words:\nno programs today'):
    compile_all(parse('v5e:2x2'), 'tests.planner_programs:stillborn', {})


def suggestions(preset, topology, seconds, tries=6, minutes=15.0, **changes):
  """`suggest` where compiling is a function: (mesh, remat) -> (seconds a step, GiB a device)."""
  config, asked = load_experiment('experiments/r1_zero.py', preset), []
  config.update_from_flattened_dict(changes)

  def plan(config, topology, *, only, **options):
    asked.append((suggest.mesh_of(config), config.model.remat))
    took, gib = seconds(*asked[-1])
    return {'fits': gib <= topology.generation.hbm_device / 2**30, 'programs': [
      {'name': 'GRPO update', 'runs_a_step': 1, 'peak_bytes': gib * 2**30, 'seconds': {'overlapped': took / 2,
                                                                                       'apart': took}}]}
  options = {'prompt_tokens': 1024, 'patience': 60.0, 'progress': lambda *_: None}
  return suggest.suggest(config, parse(topology), plan, tries=tries, minutes=minutes, options=options), asked


def test_suggestions_try_meshes_then_remat_on_the_best_and_rank_what_fits():
  def seconds(mesh, remat):
    took, gib = {'full': (0.4, 60), 'halves': (0.2, 80), 'dots': (0.1, 99)}[remat]
    return mesh['expert'] + took, gib
  result, asked = suggestions('moonlight_16b', 'v5p:2x2x4', seconds, **{'rl.prompts_per_step': 128})
  assert [remat for _, remat in asked] == ['full'] * 4 + ['halves', 'dots']
  best = min((mesh for mesh, _ in asked[:4]), key=lambda mesh: mesh['expert'])
  assert asked[4][0] == asked[5][0] == best
  assert [f['remat'] for f in result['suggestions']] == ['halves', 'full', 'full', 'full', 'full', 'dots']
  assert result['suggestions'][0]['mesh'] == best and not result['suggestions'][-1]['fits']
  assert f'{result["meshes_left"]} more meshes' in suggest.table(result)


def test_suggestions_end_with_their_time_after_one_at_the_least():
  result, asked = suggestions('tiny', 'v5e:2x2', lambda *_: (1.0, 1.0), minutes=0.0)
  assert len(asked) == len(result['suggestions']) == 1


def test_suggestions_refuse_before_any_compile_what_no_mesh_holds():
  with pytest.raises(ValueError, match='the best needs .* GiB a device: take more chips, or lower prompts_per_step'):
    suggestions('v3_671b', 'v5e:4x4', None)


def test_tables_of_slices_divide_hold_their_state_and_keep_the_papers_updates():
  experiment = 'experiments/r1_zero.py'
  with pytest.raises(ValueError, match='moonlight_16b@v5p:2x2x4.*--suggest') as refused:
    load_experiment(experiment, 'tiny@v5e:2x2')
  for name in re.findall(r'\w+@\w+:[\dx]+', str(refused.value))[1:]:
    preset, _, slice_ = name.partition('@')
    topology, plain = parse(slice_), load_experiment(experiment, preset)
    config = programs.for_planning(load_experiment(experiment, name), 1024)
    sizes, sized = programs.check(config, topology.devices)
    held = suggest.least_bytes(sized, tuple(sizes[a] for a in AXES), suggest.state_shapes(config))
    assert held < topology.generation.hbm_device, name
    for rl in (config.rl, plain.rl):
      assert rl.prompts_per_step // rl.minibatches * rl.group_size == 512  # samples an update
      assert rl.steps * rl.minibatches == 650 * 16 and rl.reference_every * rl.minibatches == 400


def test_the_attention_kernel_counts_the_blocks_that_causality_leaves():
  text = '\n'.join([
    'HloModule m, num_partitions=1', '', 'ENTRY %main (a: bf16[2,8,1024,192]) -> bf16[2,8,1024,128] {',
    '  %s = s8[1]{0} parameter(0)', '  %q = bf16[2,8,1024,192]{3,2,1,0} parameter(1)',
    '  %v = bf16[2,8,1024,128]{3,2,1,0} parameter(2)',
    '  ROOT %splash_mha_fwd_x.1 = bf16[2,8,1024,128]{3,2,1,0} custom-call(%s, %s, %q, %q, %v), '
    'custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{',
    '"xprof_metadata":"{\\"block_q\\": 256, \\"block_kv\\": 512}"',
    '}}', '}, execution_thread="main"'])
  # Queries 0-255 and 256-511 see one block of 512 keys, the later two see both: 6 of 8 blocks of 256 x 512 pairs.
  assert count.count(hlo.parse(text)).flops == 2 * 16 * 6 * 256 * 512 * (192 + 128)
