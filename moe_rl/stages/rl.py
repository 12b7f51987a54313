"""RL with rule-based rewards: R1-Zero, and the reasoning stage of R1. One step, in order:

prompts -> sample -> grade (-> sample again, where too few groups differ) -> advantages -> pack -> update -> log,
evaluate, save.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from moe_rl import config as configs
from moe_rl.data.pipeline import StepPrompts
from moe_rl.data.prompts import load_general, load_prompts
from moe_rl.data.tokenizer import load_tokenizer
from moe_rl.models.transformer import Transformer
from moe_rl.rl import grpo, objectives
from moe_rl.rl.batch import PackedBatch, one_a_group, pack
from moe_rl.rl.rewards import terms
from moe_rl.rl.rewards.model import RewardModel
from moe_rl.rl.rewards.pool import RewardPool, count_verdicts
from moe_rl.rl.sampler import Rollout
from moe_rl.rl.update import make_grpo_update, make_scoring
from moe_rl.runtime import hosts
from moe_rl.runtime import mesh as meshes
from moe_rl.runtime.costs import Costs, sampling_flops, scoring_flops, update_forwards
from moe_rl.runtime.keys import key_for
from moe_rl.runtime.programs import Program
from moe_rl.runtime.run import Clock, CompileCounter, Run
from moe_rl.runtime.state import copied, make_optimizer, make_relayout, sampler_variables
from moe_rl.stages.evaluate import Evaluation, evaluate
from moe_rl.stages.sampling import Judge, grade, jit_sampler, sample_prompts, sampler_arguments
from moe_rl.stages.spent import costs_of
from moe_rl.stages.start import Start

TRANSCRIPTS_EVERY = 5  # steps
SMALL = ('prompt_length_B', 'length_BxG', 'stopped_BxG')  # of a rollout, what every host is told of all


class RL:
  """The stage's pieces, made once: model, objective, optimizer, jitted sampler, evaluator, scoring and update.

  config: with its lengths known (`config.with_lengths`); tokenizer: config.tokenizer's, read here if it is not given.
  """

  def __init__(self, config, mesh, tokenizer=None):
    self.config, self.mesh = config, mesh
    r, s, e = config.rl, config.sampling, config.eval
    self.model = dataclasses.replace(configs.model_config(config), mtp_layers=0)  # it plays no part in RL
    self.tokenizer = tokenizer or load_tokenizer(config.tokenizer)
    self.objective = objectives.chosen(r)
    self.reference = self.objective.kl_weight > 0
    self.optimizer = make_optimizer(config, r.steps * r.minibatches * r.epochs)
    start = Start(config, self.model, self.optimizer, mesh, reference=self.reference,
                  reference_memory=r.reference_memory)
    self.start, self.init, self.abstract, self.shardings = start, start.init, start.abstract, start.shardings
    whole = meshes.everywhere(mesh)
    self.sampling = dict(temperature=s.temperature, top_k=s.top_k, top_p=s.top_p)

    self.sampler_variables = sampler_variables(self.model, mesh)
    placed = jax.tree.map(lambda x: x.sharding, self.sampler_variables)
    # On one device the sampler reads the trained weights themselves.
    self.relayout = make_relayout(self.model, mesh) if mesh.size > 1 else lambda variables: variables

    sampler = functools.partial(jit_sampler, self.model, mesh, placed, s.max_new_tokens, self.tokenizer.eos_ids)
    self.rollout = sampler(group=r.group_size, record_picks=r.replay_routing, **self.sampling)
    self.evaluation = sampler(group=e.samples, temperature=e.temperature, top_p=e.top_p)
    self.eval_prompts = configs.eval_prompts_per_batch(config)
    self.judge = RewardModel(config.rewards.model, mesh) if config.rewards.model else None
    net, by_microbatch = Transformer(self.model, meshes.Layout(mesh)), meshes.rows(mesh, leading=1)
    trained = {'params': self.shardings.params, 'router': self.shardings.router}
    self.score = None if r.old_logp == 'sampler' else jax.jit(
      make_scoring(net, r, self.sampling), in_shardings=(trained, by_microbatch, whole),
      out_shardings=(by_microbatch, whole))
    alone = mesh if r.reference_memory == 'device' and meshes.alone(mesh, self.shardings) else None
    self.update = jax.jit(
      make_grpo_update(Transformer(self.model) if alone else net, self.optimizer, r, self.sampling,
                       self.shardings.params, alone), donate_argnums=0,
      in_shardings=(self.shardings, by_microbatch, whole), out_shardings=(self.shardings, whole))

  def sample(self, variables, *prompts):
    """Completions of a step's prompts by the trained weights."""
    return self.rollout(self.relayout(variables), *prompts)

  def sample_eval(self, variables, *prompts):
    return self.evaluation(self.relayout(variables), *prompts)

  def programs(self) -> list[Program]:
    r, s = self.config.rl, self.config.sampling
    variables = {'params': self.abstract.params, 'router': self.abstract.router}

    def array(shape, dtype, leading=0):
      return jax.ShapeDtypeStruct(shape, dtype, sharding=meshes.rows(self.mesh, leading))

    def sampled(prompts):
      return sampler_arguments(self.sampler_variables, self.mesh, prompts, s.max_prompt_tokens)
    samples = r.prompts_per_step * r.group_size // r.minibatches
    shape = (-(-samples // r.microbatch_rows), r.microbatch_rows, r.row_tokens)
    ints, floats = (array(shape, d, leading=1) for d in (jnp.int32, jnp.float32))
    picks = array((*shape, self.model.moe_layers, self.model.top_k), jnp.int16, leading=1)
    batch = PackedBatch(ints, ints, ints, floats, floats, floats, picks if r.replay_routing else None)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    scored = batch if r.importance == 'none' else batch.replace(importance=floats)
    return [
      self.start.program(),
      *([Program('weights to sampler', self.relayout, (variables,))] if self.mesh.size > 1 else []),
      Program('rollout', self.rollout, sampled(r.prompts_per_step)),
      Program('evaluation', self.evaluation, sampled(self.eval_prompts)),
      *([Program('scoring', self.score, (variables, batch, count))] if self.score else []),
      *(self.judge.programs(s.max_prompt_tokens + s.max_new_tokens) if self.judge else []),
      Program('GRPO update', self.update, (self.abstract, scored, count))]

  def initial_state(self):
    """Random weights, or those of config.init_from. Raises ValueError before any compile where they do not fit."""
    return self.start.state()

  def learn(self, state, rollout: Rollout, reward_BxG: np.ndarray, readable_BxG: np.ndarray):
    """(state, metrics) after all updates on a rollout of numpy arrays, this host's; it is not changed.

    readable_BxG: bool; samples whose reference cannot be read are left out of the loss. Metrics are the last update's,
    but for the gap between sampler and trainer, which is taken at the weights that sampled: by the scoring, or else in
    the first update.
    """
    r, o = self.config.rl, self.objective
    kept = (rollout.stopped_BxG | (not o.overlong_filter)) & readable_BxG
    # Baselines and means are over the samples of all hosts.
    reward, length, kept = hosts.gather_rows([reward_BxG, rollout.length_BxG, kept])
    advantage = hosts.mine(grpo.advantages(o.advantage, reward, length * kept))
    if configs.minibatches_of_samples(self.config, hosts.count()):
      rollout, (advantage, length, kept) = one_a_group(rollout), (x.T.reshape(-1, 1) for x in (advantage, length, kept))
    own, every = (np.split(np.arange(len(x)), r.minibatches) for x in (advantage, length))

    def packed(i) -> tuple[PackedBatch, np.int32]:
      part, shape = every[i], length[every[i]].shape
      weight = grpo.token_weights(length[part].reshape(-1), o.loss_denominator,
                                  self.config.sampling.max_new_tokens, kept[part].reshape(-1))
      batch, used = pack(jax.tree.map(lambda x: x[own[i]], rollout), advantage[own[i]],
                         hosts.mine(weight.reshape(shape)), row_tokens=r.row_tokens,
                         microbatch_rows=r.microbatch_rows // hosts.count())
      return hosts.spread(batch, like=state, leading=1), np.int32(max(hosts.gather(used)))

    at_first, scored = {}, []
    if self.score:  # before the first update, and kept on the devices for all epochs
      for batch, used in map(packed, range(r.minibatches)):
        batch, found = self.score(state.variables, batch, used)
        scored.append((batch, used, found))
      found = jax.tree.map(lambda *x: np.array(x), *[jax.device_get(found) for *_, found in scored])
      at_first = {k: v.max() if k == 'sampler_gap' else v.mean() for k, v in found.items()}
    for n in range(r.minibatches * r.epochs):
      i = n % r.minibatches
      batch, used = scored[i][:2] if scored else packed(i)
      state, metrics = self.update(state, batch, used)
      if not at_first:  # later minibatches have moved away from the weights that sampled
        at_first = {k: metrics[k] for k in ('sampler_gap', 'sampler_gap_mean')}
    return state, jax.device_get(metrics | at_first)

  def judged(self, prompts, texts) -> np.ndarray:
    """float32 [B, G]: the reward model's numbers, 0 on prompts with a reference."""
    out = np.zeros((len(prompts), self.config.rl.group_size), np.float32)
    rows = [i for i, p in enumerate(prompts) if p.problem.kind == 'open' and self.judge]
    if self.judge:  # with no pair either, as the hosts score theirs together
      asked = [prompts[i].problem.question for i in rows for _ in texts[i]]
      out[rows] = self.judge.scores(asked, [text for i in rows for text in texts[i]]).reshape(len(rows), out.shape[1])
    return out

  def treated(self, groups: 'Groups', chosen: np.ndarray) -> dict[str, int]:
    """What of a step's samples the update did not see, by the rule that left it out; nothing where no rule is on.

    groups: those of all hosts; chosen: which of them are trained on.
    """
    o, out = self.objective, {}
    if o.refill_rounds:
      tied = grpo.tied_groups(groups.reward)
      out |= {'treated/rounds': groups.rounds, 'treated/tied_groups_used': int(tied[chosen].sum()),
              'treated/unused_samples': groups.reward.size - chosen.size * self.config.rl.group_size}
    left_out = ~groups.readable[chosen]
    if o.overlong_filter:
      left_out |= ~groups.rollout.stopped_BxG[chosen]
    if o.overlong_filter or left_out.any():
      out['treated/left_out_samples'] = int(left_out.sum())
    return out

  def spend(self, costs: Costs, seconds: dict[str, float], sampled: Rollout, chosen: np.ndarray):
    """Adds a step to what the run has cost; sampled: on all hosts; chosen: the groups that were trained on; seconds: by
    part, as `Clock.take` gives them, the update's being those of scoring too. Rewards run on the host and cost no
    device."""
    lengths, epochs = sampled.length_BxG[chosen], self.config.rl.epochs
    forward = scoring_flops(self.model, sampled.prompt_length_B[chosen], lengths)
    rollout = sampling_flops(self.model, sampled.prompt_length_B, sampled.length_BxG)
    used = int(lengths.sum())
    costs.add('rollout', rollout, seconds['seconds/rollout'], int(sampled.length_BxG.sum()))
    if self.score:
      costs.add('scoring', forward, 0.0, used)
    costs.add('update', forward * update_forwards(self.reference) * epochs, seconds['seconds/update'], used * epochs)


@dataclasses.dataclass(frozen=True)
class Groups:
  """Sampled and graded groups: prompts, and texts by prompt; rollout: of numpy arrays; grades: prompts outer, samples
  inner; scores: of each term of the reward, float32 [B, G]; reward: their weighted sum; readable: bool [B, G], False
  where the reference cannot be read; rounds: how many samplings they came from."""

  prompts: list
  texts: list[list[str]]
  rollout: Rollout
  grades: list
  scores: dict[str, np.ndarray]
  reward: np.ndarray
  readable: np.ndarray
  rounds: int = 1

  def __add__(self, other: 'Groups') -> 'Groups':
    return Groups(self.prompts + other.prompts, self.texts + other.texts,
                  jax.tree.map(lambda *x: np.concatenate(x), self.rollout, other.rollout), self.grades + other.grades,
                  {k: np.concatenate([g.scores[k] for g in (self, other)]) for k in self.scores},
                  *(np.concatenate([getattr(g, k) for g in (self, other)]) for k in ('reward', 'readable')),
                  self.rounds + other.rounds)

  def of_all_hosts(self) -> 'Groups':
    """Numbers of every host's groups, in the order of one process; of tokens, texts and grades, which are large, none.
    """
    if hosts.count() == 1:
      return self
    few = Rollout(**{f.name: getattr(self.rollout, f.name) if f.name in SMALL else None
                     for f in dataclasses.fields(Rollout)})
    rollout, scores, reward, readable = hosts.gather_rows([few, self.scores, self.reward, self.readable])
    return Groups([], [], rollout, [], {k: scores[k] for k in self.scores}, reward, readable, self.rounds)


def run(config, workdir, mesh) -> dict:
  """Trains to config.rl.steps from wherever the workdir is, and returns (and writes) the summary."""
  tokenizer = load_tokenizer(config.tokenizer)
  prompts, general = load_prompts(config, tokenizer), load_general(config, tokenizer)
  lengths = configs.with_lengths(config, max(prompts.longest, general.longest), meshes.rows_over(mesh.shape))
  folder, config = Run(config, workdir), lengths
  if summary := folder.finished():
    folder.close()
    return summary
  r, s, stage = config.rl, config.sampling, RL(config, mesh)
  data = StepPrompts(prompts.train, r.prompts_per_step, config.seed if prompts.finite else None, general.prompts,
                     configs.general_per_step(config), r.general_from, config.seed, hosts.shard())
  folder.catch_signals()
  state = None if folder.begun else stage.initial_state()  # before the folder is written to, as it may refuse
  restored = folder.restore(stage.abstract)
  if restored:
    step, state, host = restored
    data.set_state(host['data'])
    print(f'resumed at step {step}', flush=True)
  else:
    step = 0
    host = {'costs': {}, 'first': None, 'last': None, 'verdicts': {}, 'samples': 0, 'seconds': 0.0,
            'unused_samples': 0, 'left_out_samples': 0, 'sampler_trainer_gap': 0.0, 'sampler_trainer_gap_mean': 0.0}
  print('\n'.join([*prompts.notes, *general.notes]), flush=True)
  started, spent, clock, compiles = time.time(), host['seconds'], Clock(), CompileCounter()
  costs = costs_of(config, host['costs'])
  bar = tqdm.tqdm(total=r.steps, initial=step, unit='step', disable=not folder.main, mininterval=1)
  weighted = terms.parse(config.rewards.weights)

  with RewardPool(config.rewards.workers, config.rewards.timeout_s, config.rewards.memory_mb) as pool:
    def assess(step) -> Evaluation:
      begun = time.perf_counter()
      with clock('eval'):
        result = evaluate(
          functools.partial(sample_prompts, stage.sample_eval, state, stage.tokenizer, width=s.max_prompt_tokens,
                            key=key_for(config.seed, 'eval', step)),
          Judge(pool, stage.tokenizer, s.max_new_tokens, config.eval.language), prompts.held_out, stage.eval_prompts)
      lengths = np.array([[answer['tokens'] for answer in answers] for answers in result.problems])
      costs.add('evaluation', sampling_flops(stage.model, [len(p.ids) for p in prompts.held_out], lengths),
                time.perf_counter() - begun, lengths.sum())
      folder.log_evaluation(step, result.record())
      bar.write(f'step {step}: held-out {result}')
      return result

    def sample_and_grade(step, again) -> Groups:
      """This host's share of the next prompts_per_step prompts; `again` counts the step's further rounds, whose noise
      has addresses of its own, as a small data set may ask the same once more."""
      batch = data.take(step)
      with clock('rollout'):
        rollout, texts = sample_prompts(stage.sample, state, stage.tokenizer, batch, s.max_prompt_tokens,
                                        key_for(config.seed, 'rollout', step, *[again] if again else []))
      with clock('reward'):
        grades = grade(pool, batch, texts, weighted)
        rewards = terms.rewards(weighted, grades, rollout.length_BxG, s.max_new_tokens, stage.judged(batch, texts))
        if stage.judge and stage.judge.cut:
          host['judged_cut'] = host.get('judged_cut', 0) + stage.judge.cut
      return Groups(batch, texts, rollout, grades, rewards.scores, rewards.reward, rewards.kept)

    def collect(step) -> Groups:
      """Groups until prompts_per_step of them differ in reward, in at most 1 + refill_rounds rounds."""
      groups = sample_and_grade(step, 0)
      for again in range(1, 1 + stage.objective.refill_rounds):
        if (~grpo.tied_groups(hosts.gather_rows(groups.reward))).sum() >= r.prompts_per_step:
          break
        groups += sample_and_grade(step, again)
      return groups

    if not host['first']:
      host['first'] = host['last'] = {'step': step, **assess(step).record()}
    last = step == r.steps or folder.stop_requested
    while not last:
      groups = collect(step)
      every = groups.of_all_hosts()
      rollout, reward, tied = every.rollout, every.reward, grpo.tied_groups(every.reward)
      chosen = grpo.fill(tied, r.prompts_per_step)
      with clock('update'):
        parts = 1 if configs.minibatches_of_samples(config, hosts.count()) else r.minibatches
        learnt_from = hosts.deal([groups.rollout, groups.reward, groups.readable], chosen, parts)
        state, metrics = stage.learn(state, *learnt_from)
        for key, metric in (('sampler_trainer_gap', 'sampler_gap'), ('sampler_trainer_gap_mean', 'sampler_gap_mean')):
          host[key] = max(host[key], float(metrics[metric]))  # of any one token; of a step's mean over tokens
      step += 1
      if not np.isfinite(metrics['loss']):
        raise FloatingPointError(f'step {step}: the loss is {metrics["loss"]}; the newest checkpoint in {folder.path} '
                                 'is whole. Lower optim.lr and start again in another workdir')
      if stage.reference and r.reference_every and step % r.reference_every == 0:
        state = state.replace(reference=copied(state.params, state.reference))

      verdicts = hosts.total(count_verdicts(groups.grades))
      host['verdicts'] = {k: host['verdicts'].get(k, 0) + v for k, v in verdicts.items()}
      host['samples'] += reward.size
      treated = stage.treated(every, chosen)
      for key in ('unused_samples', 'left_out_samples'):
        host[key] += treated.get(f'treated/{key}', 0)
      is_open = hosts.gather_rows(terms.open_prompts(groups.grades, groups.reward.shape))
      scores = terms.means(every.scores, is_open)  # of all samples, used or not
      numbers = {
        'reward/mean': reward.mean(), **{f'reward/{k.replace(":", "_")}': v for k, v in scores.items()},
        'reward/tied_groups': tied.mean(), **treated, 'length/prompt': rollout.prompt_length_B.mean(),
        'length/mean': rollout.length_BxG.mean(),
        **({'reward/general_mean': reward[is_open].mean(), 'length/general': rollout.length_BxG[is_open].mean()}
           if is_open.any() else {}),
        **({'treated/judged_cut': host['judged_cut']} if 'judged_cut' in host else {}),  # so far
        'length/max': rollout.length_BxG.max(), 'length/truncated': 1 - rollout.stopped_BxG.mean(),
        'sample_crc': hosts.checksum(groups.rollout.response_BxGxS),  # tells equal samples from others
        **{f'verdict/{k}': v for k, v in verdicts.items()}, **{f'train/{k}': v for k, v in metrics.items()}}
      seconds = clock.take()
      stage.spend(costs, seconds, rollout, chosen)
      shared, own = costs.scalars()
      rate = rollout.length_BxG.sum() / max(sum(v for k, v in seconds.items() if k != 'seconds/eval'), 1e-9)
      folder.log(step, numbers | shared,
                 {**seconds, **own, 'seconds/tokens_per_second': rate, 'seconds/compiles': compiles.count})
      folder.histogram(step, 'length/tokens', rollout.length_BxG)
      folder.histogram(step, 'reward/samples', reward)
      if step % TRANSCRIPTS_EVERY == 0:
        folder.text(step, 'transcripts', transcripts(groups.prompts, groups.texts, groups.reward))
      bar.update()
      bar.set_postfix_str(f'acc {scores.get(terms.ACCURACY, np.nan):.2f} fmt {scores[terms.FORMAT]:.2f} '
                          f'len {rollout.length_BxG.mean():.1f} {rate:,.0f} tok/s')
      if step == r.steps or (config.eval.every and step % config.eval.every == 0):
        host['last'] = {'step': step, **assess(step).record()}
      last = step == r.steps or folder.stop_requested
      if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
        host |= {'data': data.get_state(), 'costs': costs.record(), 'seconds': spent + time.time() - started}
        folder.save(step, state, host)
  bar.close()
  summary = {k: host[k] for k in ('first', 'last', 'verdicts', 'samples', 'unused_samples', 'left_out_samples',
                                  'sampler_trainer_gap', 'sampler_trainer_gap_mean', 'seconds')}
  summary |= {'costs': costs.record(), 'steps': step, 'complete': step == r.steps,
              'prompts_left_out': prompts.left_out + general.left_out}
  folder.summary(summary)
  folder.close()
  return summary


def transcripts(batch, texts, reward, count: int = 4) -> str:
  """The first sample of some prompts, as Markdown, token for token as it was decoded."""
  return '\n\n'.join(f'**{p.problem.question}** (answer {p.problem.reference}, reward {r[0]:.2f})\n\n```\n{t[0]}\n```'
                     for p, t, r in list(zip(batch, texts, reward, strict=True))[:count])
