"""Training of a reward model: a language model with a scalar head, on pairs of answers or on safe and unsafe ones."""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from moe_rl import config as configs
from moe_rl.data.pipeline import batches
from moe_rl.data.preferences import Example, load_examples
from moe_rl.data.tokenizer import load_tokenizer
from moe_rl.models.transformer import Transformer
from moe_rl.refusals import refuse
from moe_rl.rl.preference import PreferenceBatch, make_margins, make_preference_update, pack, right
from moe_rl.runtime import hosts
from moe_rl.runtime import mesh as meshes
from moe_rl.runtime.programs import Program
from moe_rl.runtime.run import CompileCounter, Run
from moe_rl.runtime.state import make_optimizer
from moe_rl.stages.spent import costs_of, training_flops
from moe_rl.stages.start import Start


class RewardModelling:
  """The stage's pieces, made once. config: with its row length known (`config.with_example_length`); steps: optimizer
  updates, over which the learning rate falls."""

  def __init__(self, config, mesh, steps: int):
    c = config.reward_model
    self.config, self.mesh, self.steps = config, mesh, steps
    self.model = configs.model_config(config)
    self.optimizer = make_optimizer(config, steps)
    start = Start(config, self.model, self.optimizer, mesh, reference=False)
    self.start, self.init, self.abstract, self.shardings = start, start.init, start.abstract, start.shardings
    net, whole = Transformer(self.model, meshes.Layout(mesh)), meshes.everywhere(mesh)
    self.by_microbatch = meshes.rows(mesh, leading=1)
    self.update = jax.jit(
      make_preference_update(net, self.optimizer, c.examples_per_step), donate_argnums=0,
      in_shardings=(self.shardings, self.by_microbatch, whole), out_shardings=(self.shardings, whole))
    trained = {'params': self.shardings.params, 'router': self.shardings.router}
    self.margins = jax.jit(make_margins(net), in_shardings=(trained, self.by_microbatch, whole), out_shardings=whole)

  def programs(self) -> list[Program]:
    c = self.config.reward_model
    shape = (-(-c.examples_per_step // c.microbatch_rows), c.microbatch_rows, c.row_tokens)
    ints, floats = (jax.ShapeDtypeStruct(shape, d, sharding=self.by_microbatch) for d in (jnp.int32, jnp.float32))
    batch, count = PreferenceBatch(ints, ints, ints, floats, ints), jax.ShapeDtypeStruct((), jnp.int32)
    variables = {'params': self.abstract.params, 'router': self.abstract.router}
    return [self.start.program(), Program('preference update', self.update, (self.abstract, batch, count)),
            Program('judging', self.margins, (variables, batch, count))]

  def packed(self, examples: list[Example]) -> tuple[PreferenceBatch, np.int32]:
    c = self.config.reward_model
    batch, used = pack(examples, row_tokens=c.row_tokens, microbatch_rows=c.microbatch_rows, count=c.examples_per_step)
    return batch, np.int32(used)

  def evaluate(self, state, examples: list[Example]) -> dict[str, float]:
    """accuracy: share of the examples judged right (ties half), with its standard error; loss: nats an example."""
    size, found = self.config.reward_model.examples_per_step, []
    for start in range(0, len(examples), size):
      batch, used = self.packed(examples[start:start + size])
      margins = self.margins(state.variables, hosts.split(batch, self.by_microbatch), used)
      found.append(np.asarray(margins)[batch.sign != 0])
    margin = np.concatenate(found).astype(np.float64)
    correct = right(margin)
    error = correct.std(ddof=1) / math.sqrt(correct.size) if correct.size > 1 else math.nan
    return {'accuracy': float(correct.mean()), 'accuracy_se': float(error),
            'loss': float(np.logaddexp(0, -margin).mean()), 'examples': int(correct.size)}


def run(config, workdir, mesh) -> dict:
  """Trains from wherever the workdir is; returns (and writes) the summary."""
  examples = load_examples(config, load_tokenizer(config.tokenizer))
  lengths = configs.with_example_length(config, examples.longest, meshes.rows_over(mesh.shape))
  c = lengths.reward_model
  refuse(len(examples.train) < c.examples_per_step,
         f'{c.path} leaves {len(examples.train)} examples to train on, fewer than '
         f'config.reward_model.examples_per_step {c.examples_per_step}: lower that')
  steps = max(1, math.ceil(c.epochs * len(examples.train) / c.examples_per_step))
  folder, config = Run(config, workdir), lengths
  if summary := folder.finished():
    folder.close()
    return summary
  stage = RewardModelling(config, mesh, steps)
  data = batches(examples.train, c.examples_per_step, shuffle_seed=config.seed, as_list=True)
  folder.catch_signals()
  state = None if folder.begun else stage.start.state()  # before the folder is written to, as it may refuse
  restored = folder.restore(stage.abstract)
  if restored:
    step, state, host = restored
    data.set_state(host['data'])
    print(f'resumed at step {step}', flush=True)
  else:
    step, host = 0, {'first': None, 'last': None, 'seconds': 0.0, 'tokens': 0}
  sizes = f'{steps} steps of {c.examples_per_step} examples in rows of {c.row_tokens} tokens'
  print('\n'.join([*examples.notes, sizes]), flush=True)
  compiles, started, spent = CompileCounter(), time.time(), host['seconds']
  bar = tqdm.tqdm(total=steps, initial=step, unit='step', disable=not folder.main, mininterval=1)
  host['first'] = host['first'] or {'step': step, **stage.evaluate(state, examples.held_out)}
  begun = step
  while step < steps and not folder.stop_requested:
    at = time.time()
    batch, used = stage.packed(next(data))
    state, metrics = stage.update(state, hosts.split(batch, stage.by_microbatch), used)
    metrics, step = jax.device_get(metrics), step + 1
    if not np.isfinite(metrics['loss']):
      raise FloatingPointError(f'step {step}: the loss is {metrics["loss"]}; the newest checkpoint in {folder.path} '
                               'is whole. Lower optim.lr and start again in another workdir')
    tokens = int((batch.segments > 0).sum())
    host['tokens'] += tokens
    padding = 1 - tokens / (used * c.microbatch_rows * c.row_tokens)
    if step == steps or (c.eval_every and step % c.eval_every == 0):
      host['last'] = {'step': step, **stage.evaluate(state, examples.held_out)}
      metrics |= {f'held_out/{k}': host['last'][k] for k in ('accuracy', 'loss')}
      bar.write(f'step {step}: held-out accuracy {host["last"]["accuracy"]:.3f} ± {host["last"]["accuracy_se"]:.3f}')
    folder.log(step, {**metrics, 'tokens': tokens, 'padding': padding},
               {'seconds': time.time() - at, 'compiles': compiles.count})
    bar.update()
    bar.set_postfix_str(f'loss {metrics["loss"]:.3f} acc {metrics["accuracy"]:.2f}')
    if config.checkpoint.every and step % config.checkpoint.every == 0 and step < steps:
      folder.save(step, state, host | {'data': data.get_state(), 'seconds': spent + time.time() - started})
  host |= {'data': data.get_state(), 'seconds': spent + time.time() - started}
  if step > begun:
    folder.save(step, state, host)
  bar.close()
  summary = {k: host[k] for k in ('first', 'last', 'tokens', 'seconds')}
  costs = costs_of(config)  # a quarter of a row, which holds two answers of a pair, is what a token sees on average
  costs.add('update', training_flops(stage.model, host['tokens'], c.row_tokens / 4), host['seconds'], host['tokens'])
  summary |= {'costs': costs.record(), 'steps': step, 'complete': step == steps, 'examples': len(examples.train),
              'left_out': examples.left_out, 'kind': c.kind}
  folder.summary(summary)
  folder.close()
  return summary
