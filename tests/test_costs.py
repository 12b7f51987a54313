"""What a run has cost: sums by part, money by the hour, and the same FLOPs as counted by hand."""

import pytest
import runs

from moe_rl.models.config import preset
from moe_rl.planner.prices import CHIP_HOUR, device_hour
from moe_rl.runtime.costs import Costs, forward_flops, grpo_flops, sampling_flops


def test_costs_add_up_by_part_and_go_on_from_a_record():
  costs = Costs(devices=4, device_hour=3.6)
  costs.add('rollout', flops=10, seconds=2, tokens=5)
  costs.add('update', flops=30, seconds=1, tokens=5)
  record = Costs(4, 3.6, costs.record())
  record.add('rollout', flops=1, seconds=1, tokens=2)
  parts = record.record()
  assert parts['rollout'] == {'flops': 11, 'device_seconds': 12, 'tokens': 7, 'dollars': pytest.approx(0.012)}
  assert parts['total'] == {'flops': 41, 'device_seconds': 16, 'tokens': 12, 'dollars': pytest.approx(0.016)}
  shared, own = record.scalars()
  assert shared == {'cost/flops': 41, 'cost/tokens': 12} and own['cost/device_seconds'] == 16


def test_prices_are_the_configs_or_the_tables():
  assert device_hour(1.5, 'TPU v5p') == 1.5
  assert device_hour(0.0, 'TPU v5') == CHIP_HOUR['v5p'] and device_hour(0.0, 'cpu') == 0.0
  assert device_hour(0.0, 'TPU7x') == CHIP_HOUR['tpu7x'] / 2  # two devices a chip


def test_sampling_is_a_prefill_a_prompt_and_a_forward_pass_of_every_new_token():
  model = preset('tiny', mtp_layers=0)
  # Two prompts of 6 tokens, which see 3 on average, and their last hidden state alone is unembedded; three answers of 4
  # tokens each, which see the prompt and, on average, half of their own.
  by_hand = forward_flops(model, 12, 3, head_tokens=2) + forward_flops(model, 24, 6 + 2)
  assert sampling_flops(model, [6, 6], [[4, 4, 4], [4, 4, 4]]) == pytest.approx(by_hand)
  found = grpo_flops(model, [6, 6], [[4, 4, 4], [4, 4, 4]], reference=True)
  assert found['rollout'] == pytest.approx(by_hand)
  assert found['update'] == pytest.approx(4 * forward_flops(model, 60, 5, head_tokens=24))


def test_a_run_says_what_it_cost():
  path, _ = runs.trained()
  costs, steps = runs.summary(path)['costs'], runs.metrics(path)
  assert set(costs) == {'evaluation', 'rollout', 'update', 'total'} and costs['total']['dollars'] == 0.0  # a CPU
  samples = runs.RL['rl']['prompts_per_step'] * runs.RL['rl']['group_size']
  assert costs['rollout']['tokens'] == pytest.approx(sum(s['length/mean'] for s in steps) * samples)
  assert 0 < costs['rollout']['flops'] < costs['update']['flops']  # one forward pass against four
  assert 0 < costs['total']['device_seconds'] < runs.summary(path)['seconds'] + 60
  flops = [s['cost/flops'] for s in steps]
  assert flops == sorted(flops) and flops[-1] <= costs['total']['flops']
