"""RL with rule-based rewards: R1-Zero, and the reasoning stage of R1. One step, in order:

prompts -> sample -> grade -> advantages -> pack -> update -> log, evaluate, save.
"""

import dataclasses
import functools
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from moe_rl import config as configs
from moe_rl.data.pipeline import batches
from moe_rl.data.prompts import load_prompts
from moe_rl.data.tokenizer import load_tokenizer
from moe_rl.rl import grpo
from moe_rl.rl.batch import PackedBatch, pack
from moe_rl.rl.rewards.pool import Item, RewardPool, count_verdicts
from moe_rl.rl.sampler import Rollout, make_sampler
from moe_rl.rl.update import make_grpo_update
from moe_rl.runtime import mesh as meshes
from moe_rl.runtime.keys import key_for
from moe_rl.runtime.programs import Program
from moe_rl.runtime.run import Clock, CompileCounter, Run
from moe_rl.runtime.state import copied, make_optimizer
from moe_rl.stages.evaluate import Evaluation, evaluate
from moe_rl.stages.start import Start

TRANSCRIPTS_EVERY = 5  # steps


class RL:
  """The stage's pieces, made once: model, optimizer, jitted sampler, evaluator and update.

  config: with its lengths known (`config.with_lengths`); tokenizer: config.tokenizer's, read here if it is not given.
  """

  def __init__(self, config, mesh, tokenizer=None):
    self.config, self.mesh = config, mesh
    r, s, e = config.rl, config.sampling, config.eval
    self.model = dataclasses.replace(configs.model_config(config), mtp_layers=0)  # it plays no part in RL
    self.tokenizer = tokenizer or load_tokenizer(config.tokenizer)
    self.optimizer = make_optimizer(config, r.steps * r.minibatches * r.epochs)
    start = Start(config, self.model, self.optimizer, mesh, reference=r.kl_weight > 0)
    self.start, self.init, self.abstract, self.shardings = start, start.init, start.abstract, start.shardings
    self.variables_shardings = {'params': self.shardings.params, 'router': self.shardings.router}
    by_row, whole = meshes.rows(mesh), meshes.everywhere(mesh)
    self.sampling = dict(temperature=s.temperature, top_k=s.top_k, top_p=s.top_p)

    def jit_sampler(**kwargs):
      sample = make_sampler(self.model, max_new=s.max_new_tokens, eos_id=self.tokenizer.eos_ids, **kwargs)
      return jax.jit(sample, in_shardings=(self.variables_shardings, by_row, by_row, by_row, whole),
                     out_shardings=by_row)
    self.sample = jit_sampler(group=r.group_size, **self.sampling)
    self.sample_eval = jit_sampler(group=e.samples, temperature=e.temperature, top_p=e.top_p)
    self.eval_prompts = configs.eval_prompts_per_batch(config)
    self.update = jax.jit(
      make_grpo_update(self.model, self.optimizer, r, self.sampling), donate_argnums=0,
      in_shardings=(self.shardings, meshes.rows(mesh, leading=1), whole), out_shardings=(self.shardings, whole))

  def programs(self) -> list[Program]:
    r, s = self.config.rl, self.config.sampling
    variables = {'params': self.abstract.params, 'router': self.abstract.router}

    def array(shape, dtype, leading=0):
      return jax.ShapeDtypeStruct(shape, dtype, sharding=meshes.rows(self.mesh, leading))

    def sampler_arguments(prompts):
      return (variables, array((prompts, s.max_prompt_tokens), jnp.int32), array((prompts,), jnp.int32),
              array((prompts,), jnp.int32), jax.eval_shape(lambda: jax.random.key(0)))
    samples = r.prompts_per_step // r.minibatches * r.group_size
    shape = (-(-samples // r.microbatch_rows), r.microbatch_rows, r.row_tokens)
    ints, floats = (array(shape, d, leading=1) for d in (jnp.int32, jnp.float32))
    return [
      self.start.program(),
      Program('rollout', self.sample, sampler_arguments(r.prompts_per_step)),
      Program('evaluation', self.sample_eval, sampler_arguments(self.eval_prompts)),
      Program('GRPO update', self.update, (
        self.abstract, PackedBatch(ints, ints, ints, floats, floats, floats), jax.ShapeDtypeStruct((), jnp.int32)))]

  def initial_state(self):
    """Random weights, or those of config.init_from. Raises ValueError before any compile where they do not fit."""
    return self.start.state()


def sample_prompts(run_sampler, state, tokenizer, prompts, width: int, key) -> tuple[Rollout, list[list[str]]]:
  """Samples for a list of `Prompt`; the rollout as numpy arrays and the answers' texts by prompt."""
  ids = np.zeros((len(prompts), width), np.int32)
  for row, prompt in zip(ids, prompts, strict=True):
    row[:len(prompt.ids)] = prompt.ids
  lengths = np.array([len(p.ids) for p in prompts], np.int32)
  addresses = np.array([p.problem.id for p in prompts], np.int32)
  rollout = jax.device_get(run_sampler(state.variables, ids, lengths, addresses, key))
  texts = [[p.opening + tokenizer.decode(r[:n]) for r, n in zip(rs, ns, strict=True)]
           for p, rs, ns in zip(prompts, rollout.response_BxGxS, rollout.length_BxG, strict=True)]
  return rollout, texts


def grade(pool: RewardPool, prompts, texts):
  """Grades in order, prompts outer, samples inner."""
  return pool.grade([Item(p.problem.kind, t, p.problem.reference)
                     for p, ts in zip(prompts, texts, strict=True) for t in ts])


def run(config, workdir, mesh) -> dict:
  """Trains to config.rl.steps from wherever the workdir is, and returns (and writes) the summary."""
  prompts = load_prompts(config, load_tokenizer(config.tokenizer))
  lengths = configs.with_lengths(config, prompts.longest, mesh.shape['data'] * mesh.shape['fsdp'])
  folder, config = Run(config, workdir), lengths
  if summary := folder.finished():
    folder.close()
    return summary
  r, s, stage = config.rl, config.sampling, RL(config, mesh)
  data = batches(prompts.train, r.prompts_per_step, shuffle_seed=config.seed if prompts.finite else None, as_list=True)
  folder.catch_signals()
  state = None if folder.begun else stage.initial_state()  # before the folder is written to, as it may refuse
  restored = folder.restore(stage.abstract)
  if restored:
    step, state, host = restored
    data.set_state(host['data'])
    print(f'resumed at step {step}', flush=True)
  else:
    step = 0
    host = {'first': None, 'last': None, 'verdicts': {}, 'samples': 0, 'seconds': 0.0,
            'sampler_trainer_gap': 0.0, 'sampler_trainer_gap_mean': 0.0}
  print('\n'.join(prompts.notes), flush=True)
  started, spent, clock, compiles = time.time(), host['seconds'], Clock(), CompileCounter()
  bar = tqdm.tqdm(total=r.steps, initial=step, unit='step', disable=not folder.main, mininterval=1)

  with RewardPool(config.rewards.workers, config.rewards.timeout_s, config.rewards.memory_mb) as pool:
    def assess(step) -> Evaluation:
      with clock('eval'):
        result = evaluate(
          functools.partial(sample_prompts, stage.sample_eval, state, stage.tokenizer, width=s.max_prompt_tokens,
                            key=key_for(config.seed, 'eval', step)),
          functools.partial(grade, pool), prompts.held_out, stage.eval_prompts)
      folder.log_evaluation(step, result.record())
      bar.write(f'step {step}: held-out {result}')
      return result

    if not host['first']:
      host['first'] = host['last'] = {'step': step, **assess(step).record()}
    last = step == r.steps or folder.stop_requested
    while not last:
      batch = next(data)
      with clock('rollout'):
        rollout, texts = sample_prompts(stage.sample, state, stage.tokenizer, batch, s.max_prompt_tokens,
                                        key_for(config.seed, 'rollout', step))
      with clock('reward'):
        grades = grade(pool, batch, texts)
      shape = rollout.length_BxG.shape
      accuracy = np.array([g.accuracy for g in grades], np.float32).reshape(shape)
      form = np.array([g.format for g in grades], np.float32).reshape(shape)
      reward = config.rewards.accuracy_weight * accuracy + config.rewards.format_weight * form
      advantage = grpo.group_advantage(reward, scale_by_std=r.scale_by_std)

      with clock('update'):
        for n, part in enumerate(list(np.split(np.arange(shape[0]), r.minibatches)) * r.epochs):
          share = jax.tree.map(lambda x, part=part: x[part], rollout)
          weight = grpo.token_weights(share.length_BxG.reshape(-1), r.loss_denominator, s.max_new_tokens)
          packed, microbatches = pack(share, advantage[part], weight.reshape(share.length_BxG.shape),
                                      row_tokens=r.row_tokens, microbatch_rows=r.microbatch_rows)
          state, metrics = stage.update(state, packed, np.int32(microbatches))
          if n == 0:  # later minibatches have moved away from the weights that sampled
            gap = {k: metrics[k] for k in ('sampler_gap', 'sampler_gap_mean')}
        metrics = jax.device_get(metrics | gap)
        for key, metric in (('sampler_trainer_gap', 'sampler_gap'), ('sampler_trainer_gap_mean', 'sampler_gap_mean')):
          host[key] = max(host[key], float(metrics[metric]))  # of any one token; of a step's mean over tokens
      step += 1
      if not np.isfinite(metrics['loss']):
        raise FloatingPointError(f'step {step}: the loss is {metrics["loss"]}; the newest checkpoint in {folder.path} '
                                 'is whole. Lower optim.lr and start again in another workdir')
      if r.kl_weight and r.reference_every and step % r.reference_every == 0:
        state = state.replace(reference=copied(state.params))

      verdicts = count_verdicts(grades)
      host['verdicts'] = {k: host['verdicts'].get(k, 0) + v for k, v in verdicts.items()}
      host['samples'] += len(grades)
      numbers = {
        'reward/mean': reward.mean(), 'reward/accuracy': accuracy.mean(), 'reward/format': form.mean(),
        'reward/tied_groups': grpo.tied_groups(reward).mean(), 'length/prompt': rollout.prompt_length_B.mean(),
        'length/mean': rollout.length_BxG.mean(),
        'length/max': rollout.length_BxG.max(), 'length/truncated': 1 - rollout.stopped_BxG.mean(),
        'sample_crc': zlib.crc32(rollout.response_BxGxS.tobytes()),  # tells equal samples from others
        **{f'verdict/{k}': v for k, v in verdicts.items()}, **{f'train/{k}': v for k, v in metrics.items()}}
      seconds = clock.take()
      rate = rollout.length_BxG.sum() / max(sum(v for k, v in seconds.items() if k != 'seconds/eval'), 1e-9)
      folder.log(step, numbers, {**seconds, 'seconds/tokens_per_second': rate, 'seconds/compiles': compiles.count})
      folder.histogram(step, 'length/tokens', rollout.length_BxG)
      folder.histogram(step, 'reward/samples', reward)
      if step % TRANSCRIPTS_EVERY == 0:
        folder.text(step, 'transcripts', transcripts(batch, texts, reward))
      bar.update()
      bar.set_postfix_str(f'acc {accuracy.mean():.2f} fmt {form.mean():.2f} len {rollout.length_BxG.mean():.1f} '
                          f'{rate:,.0f} tok/s')
      if step == r.steps or (config.eval.every and step % config.eval.every == 0):
        host['last'] = {'step': step, **assess(step).record()}
      last = step == r.steps or folder.stop_requested
      if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
        host |= {'data': data.get_state(), 'seconds': spent + time.time() - started}
        folder.save(step, state, host)
  bar.close()
  summary = {k: host[k] for k in ('first', 'last', 'verdicts', 'samples', 'sampler_trainer_gap',
                                  'sampler_trainer_gap_mean', 'seconds')}
  summary |= {'steps': step, 'complete': step == r.steps, 'prompts_left_out': prompts.left_out}
  folder.summary(summary)
  folder.close()
  return summary


def transcripts(batch, texts, reward, count: int = 4) -> str:
  """The first sample of some prompts, as Markdown, token for token as it was decoded."""
  return '\n\n'.join(f'**{p.problem.question}** (answer {p.problem.reference}, reward {r[0]:.2f})\n\n```\n{t[0]}\n```'
                     for p, t, r in list(zip(batch, texts, reward, strict=True))[:count])
