"""Shared by tests: a miniature checkpoint of every family, and what `transformers` says of it.

The weights are integer hashes of their tensor's name, the same on every machine, so that only the reference's numbers
are kept (tests/data/golden_families.npz, made by tests/make_golden.py). They are large (logits spread over nats); norms
have scales of 0.5 to 1.5 and most an eps of 0.01, biases have both signs: whatever goes wrong shows in the logits.
"""

import functools
import json
import pathlib
import tempfile
import zlib

import flax
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from moe_rl.models.hf_import import load_model
from moe_rl.models.hf_names import names
from moe_rl.models.transformer import Transformer
from moe_rl.rl.sampler import make_sampler

GOLDEN = pathlib.Path(__file__).parent / 'data' / 'golden_families.npz'
ROWS, LENGTH, VOCABULARY = 3, 40, 80
NEW = 64  # greedily decoded tokens
PROMPTS = np.array([12, 5, 9], np.int32)  # their lengths, padded to 12

_COMMON = dict(
  vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_attention_heads=4,
  num_key_value_heads=4, max_position_embeddings=128, bos_token_id=None, eos_token_id=None, pad_token_id=None)
_LATENT = _COMMON | dict(
  num_hidden_layers=2, first_k_dense_replace=0, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12,
  moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=3)
_GROUPED = _COMMON | dict(num_hidden_layers=2, num_key_value_heads=2)
# Contexts of 16 tokens here and 32 with Llama: rows of 40 tokens and greedy answers of 64 go beyond them.
_YARN = dict(rope_type='yarn', factor=8.0, original_max_position_embeddings=16, beta_fast=2.0, beta_slow=0.25)

CASES: dict[str, dict] = {
  'v3, low-rank queries, groups of experts, YaRN of unequal magnitudes, prediction module': _LATENT | dict(
    model_type='deepseek_v3', num_hidden_layers=3, first_k_dense_replace=1, q_lora_rank=24, n_shared_experts=1,
    n_group=4, topk_group=2, routed_scaling_factor=2.5, rms_norm_eps=0.01, num_nextn_predict_layers=1,
    rope_theta=10_000.0,
    rope_scaling=_YARN | dict(mscale=1.0, mscale_all_dim=0.5)),
  'v3, direct queries, one group, tied': _LATENT | dict(
    model_type='deepseek_v3', q_lora_rank=None, n_shared_experts=2, n_group=1, topk_group=1,
    routed_scaling_factor=2.446, rms_norm_eps=0.01, num_nextn_predict_layers=0, rope_theta=50_000.0,
    tie_word_embeddings=True),
  'v2, direct queries, YaRN': _LATENT | dict(
    model_type='deepseek_v2', q_lora_rank=None, n_shared_experts=2, topk_method='greedy', routed_scaling_factor=1.0,
    rms_norm_eps=1e-6, rope_theta=10_000.0, rope_scaling=_YARN | dict(mscale=0.707, mscale_all_dim=0.707)),
  'v2, low-rank queries, groups of experts': _LATENT | dict(
    model_type='deepseek_v2', q_lora_rank=24, n_shared_experts=1, topk_method='group_limited_greedy', n_group=4,
    topk_group=2, routed_scaling_factor=4.0, rms_norm_eps=1e-6, rope_theta=10_000.0),
  'qwen2, YaRN, tied': _GROUPED | dict(
    model_type='qwen2', rms_norm_eps=1e-6, rope_theta=10_000.0, rope_scaling=_YARN, tie_word_embeddings=True),
  'qwen3, tied': _GROUPED | dict(
    model_type='qwen3', head_dim=12, rms_norm_eps=0.01, rope_theta=1e6, tie_word_embeddings=True),
  'llama, scaled positions': _GROUPED | dict(
    model_type='llama', rms_norm_eps=0.01, rope_theta=100.0, rope_scaling=dict(
      rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)),
}


def hashed(text: str, count: int) -> np.ndarray:
  """uint64 [count]: splitmix64 from the text's checksum."""
  x = np.arange(1, count + 1, dtype=np.uint64) + (np.uint64(zlib.crc32(text.encode())) << np.uint64(32))
  with np.errstate(over='ignore'):
    x *= np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """float32 of a tensor with this name on the hub: k / 256 for odd k, so that bfloat16 and float32 hold it exactly."""
  odd = 2 * (hashed(name, int(np.prod(shape))) >> np.uint64(57)).astype(np.float32) - 127  # -127 to 127
  if name.endswith('norm.weight'):
    return (1 + odd / 256).reshape(shape)
  if name.endswith('e_score_correction_bias'):
    odd = odd / 2  # more would leave experts that no token picks
  return (odd / (128 if 'embed' in name else 256)).reshape(shape)


def write_checkpoint(folder: pathlib.Path, config: dict, shapes: dict[str, tuple[int, ...]]) -> pathlib.Path:
  """config.json and model.safetensors with `numbers`."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config))
  safetensors.numpy.save_file({name: numbers(name, shape) for name, shape in shapes.items()},
                              folder / 'model.safetensors', metadata={'format': 'pt'})
  return folder


def batch() -> tuple[np.ndarray, np.ndarray]:
  """(ids int32 [N, L], bool [N, L] where there is a token): a full row, one padded left, one right, with id 0."""
  ids = (hashed('ids', ROWS * LENGTH) % np.uint64(VOCABULARY - 1)).astype(np.int32).reshape(ROWS, LENGTH) + 1
  valid = np.ones((ROWS, LENGTH), bool)
  valid[1, :7], valid[2, -9:] = False, False
  return np.where(valid, ids, 0), valid


def prompts() -> np.ndarray:
  """int32 [3, 12], right-padded: the first tokens of the rows' own."""
  ids = np.stack([row[kept][:PROMPTS.max()] for row, kept in zip(*batch(), strict=True)])
  return np.where(np.arange(PROMPTS.max()) < PROMPTS[:, None], ids, 0)


def positions(valid: np.ndarray) -> np.ndarray:
  """int32 [N, L], from 0 at each row's first token."""
  return np.maximum(np.cumsum(valid, axis=1) - 1, 0).astype(np.int32)


def targets(valid: np.ndarray) -> np.ndarray:
  """bool [N, L - 1]: whether the next id is a token that is predicted from one."""
  return valid[:, 1:] & valid[:, :-1]


@functools.cache
def golden(case: str) -> dict:
  """What the reference said: 'config', 'shapes', 'gradients' as parsed JSON, 'logits', 'logprobs', 'greedy', 'second'
  as arrays."""
  with np.load(GOLDEN) as file:
    found = {key.rpartition('/')[2]: file[key] for key in file.files if key.rpartition('/')[0] == case}
  return found | {key: json.loads(str(found[key])) for key in ('config', 'shapes', 'gradients')}


class Ours:
  """The model's own numbers on the same batch, from a checkpoint through the importer; each program compiled once.

  config, variables: as imported, in float32; logits, logprobs, second: as `golden` has them; gradients: norm of the
  mean loss's gradient by the hub's tensor name; greedy: int32 [3, 64], decoded from the prompts by prefill and cache.
  """

  def __init__(self, folder: pathlib.Path):
    self.config, self.variables = load_model(folder)
    self._net = Transformer(self.config)
    grade = jax.jit(jax.value_and_grad(self._loss, has_aux=True))
    (_, out), gradients = grade(self.variables['params'], self.variables['router'])
    self.logits, self.logprobs, self.second = (np.asarray(x) for x in out)
    flat = flax.traverse_util.flatten_dict({'params': gradients}, sep='/')
    self.gradients = {name: float(np.linalg.norm(np.asarray(flat[slot.path][slot.index], np.float64)))
                      for name, slot in names(self.config).items() if slot.path in flat and not slot.copy}
    sampler = make_sampler(Transformer(self.config), group=1, max_new=NEW, eos_id=-1, top_k=1)
    rollout = jax.jit(sampler)(
      self.variables, prompts(), PROMPTS, np.arange(3, dtype=np.int32), jax.random.key(0))
    self.greedy = np.asarray(rollout.response_BxGxS)[:, 0]

  def _loss(self, params, router):
    net, variables, (ids, valid) = self._net, {'params': params, 'router': router}, batch()
    placed = positions(valid), valid.astype(np.int32)

    hidden = net.apply(variables, ids, *placed).hidden_NxTxD
    logits = net.apply(variables, hidden, method=net.logits)
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)[..., 0]
    second = jnp.zeros((ROWS, LENGTH, 0))
    if self.config.mtp_layers:
      further = net.apply(variables, hidden, ids, *placed, method=net.second_hidden)
      second = net.apply(variables, further, method=net.second_logits)
    counted = targets(valid)
    return -(logp * counted).sum() / counted.sum(), (logits, logp, second[0, :-1])


@functools.cache
def ours(case: str) -> Ours:
  """From the case's checkpoint, written anew; once a session."""
  with tempfile.TemporaryDirectory() as folder:
    return Ours(write_checkpoint(pathlib.Path(folder), golden(case)['config'], golden(case)['shapes']))


def assert_the_same(own: Ours, reference: dict):
  """What float32 in another order of sums may do; seen are a tenth of it and less, over logits of up to 12.

  Logits 2e-4, log-probs 1e-4 nats, norms of gradients 1e-3 relative (an expert that no token picked has none, which is
  exact), greedy ids all equal.
  """
  valid = batch()[1]
  np.testing.assert_allclose(own.logits[valid], reference['logits'][valid], rtol=0, atol=2e-4)
  counted = targets(valid)
  np.testing.assert_allclose(own.logprobs[counted], reference['logprobs'][counted], rtol=0, atol=1e-4)
  wanted = reference['gradients']
  prediction = f'model.layers.{own.config.layers}.'  # takes no part in the loss
  assert wanted.keys() == {name for name in own.gradients if not name.startswith(prediction)}
  names_, norms = list(wanted), np.array(list(wanted.values()))
  np.testing.assert_allclose([own.gradients[n] for n in names_], norms, rtol=1e-3, err_msg=str(names_))
  np.testing.assert_array_equal(own.greedy, reference['greedy'])
