"""The model's sizes, as data: one frozen record for every family member, and the presets by name."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Yarn:
  """YaRN context extension (arXiv:2309.00071) with DeepSeek's two magnitudes. Lengths in tokens."""

  factor: float = 40.0
  original_length: int = 4096
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float = 1.0
  mscale_all_dim: float = 1.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Sizes of a DeepSeek-V3-style Transformer (DeepSeek-V3, arXiv:2412.19437, sec. 2.1 and 4.2)."""

  vocab_size: int
  layers: int
  dense_layers: int  # the first ones, with a plain SwiGLU in place of experts
  width: int  # D
  dense_ff: int  # SwiGLU width of the dense layers
  heads: int  # H
  q_lora: int  # rank of the query's down-projection; 0: queries come straight from the hidden state
  kv_lora: int  # C, the cached latent
  nope_dim: int  # per head, without position
  rope_dim: int  # R, per head for queries, one shared key head
  v_dim: int
  experts: int  # E, routed
  shared_experts: int  # fused into one SwiGLU of width shared_experts * expert_ff
  top_k: int  # K
  expert_ff: int
  groups: int = 1  # experts are chosen from the `kept_groups` best of `groups` groups
  kept_groups: int = 1
  score: str = 'sigmoid'  # 'sigmoid' (V3, with a selection bias) or 'softmax' (V2, without)
  norm_top_k: bool = True  # gates are divided by their sum
  route_scale: float = 1.0
  mtp_layers: int = 0  # multi-token prediction depth, 0 or 1
  rope_theta: float = 10_000.0
  yarn: Yarn | None = None
  max_length: int = 4096  # tokens
  norm_eps: float = 1e-6
  init_std: float = 0.006  # V2 and V3 papers; config.json's 0.02 is a library default

  # How it runs; changes no number beyond rounding.
  compute_dtype: str = 'float32'
  param_dtype: str = 'float32'
  remat: str = 'none'  # 'none', 'dots' (keep matrix products) or 'full' (keep layer inputs only)
  expert_path: str = 'auto'  # 'auto', 'ragged', 'rounds' or 'dense': see moe.experts

  @property
  def qk_dim(self) -> int:
    return self.nope_dim + self.rope_dim

  @property
  def latent_dim(self) -> int:
    """Cached numbers a token a layer: normed latent and rotated shared key."""
    return self.kv_lora + self.rope_dim

  @property
  def moe_layers(self) -> int:
    return self.layers - self.dense_layers

  @property
  def softmax_scale(self) -> float:
    """qk_dim^-0.5, times YaRN's squared magnitude over all dimensions where YaRN is on."""
    m = 1.0 if self.yarn is None else yarn_magnitude(self.yarn.factor, self.yarn.mscale_all_dim)
    return self.qk_dim**-0.5 * m * m

  def __post_init__(self):
    need(self.rope_dim % 2 == 0, f'rope_dim {self.rope_dim} must be even')
    need(0 <= self.dense_layers <= self.layers, f'dense_layers {self.dense_layers} not in 0..{self.layers}')
    need(self.score in ('sigmoid', 'softmax'), f"score '{self.score}': use 'sigmoid' or 'softmax'")
    need(self.remat in ('none', 'dots', 'full'), f"remat '{self.remat}': use 'none', 'dots' or 'full'")
    need(self.expert_path in ('auto', 'ragged', 'rounds', 'dense'),
         f"expert_path '{self.expert_path}': use 'auto', 'ragged', 'rounds' or 'dense'")
    need(self.mtp_layers in (0, 1), f'mtp_layers {self.mtp_layers}: only 0 and 1 exist')
    if self.moe_layers or self.mtp_layers:
      need(self.experts % self.groups == 0,
           f'experts {self.experts} do not divide into {self.groups} groups: change experts or groups')
      need(1 <= self.kept_groups <= self.groups, f'kept_groups {self.kept_groups} not in 1..{self.groups}')
      reachable = self.experts // self.groups * self.kept_groups
      need(1 <= self.top_k <= reachable,
           f'top_k {self.top_k} needs 1..{reachable} experts in the kept groups: lower top_k or keep more groups')


def need(ok: bool, message: str):
  """Raises ValueError with `message`, prefixed by its section, unless ok."""
  if not ok:
    raise ValueError(f'config.model: {message}')


def yarn_magnitude(factor: float, mscale: float) -> float:
  """m(x) = 0.1 x ln(factor) + 1 for factor > 1 (YaRN sec. 3.4, as DeepSeek generalises it)."""
  return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


# Sizes of the released models are those of their config.json; `tiny` and `small` are ours.
PRESETS: dict[str, dict] = {
  'tiny': dict(
    vocab_size=384, layers=3, dense_layers=1, width=128, dense_ff=256, heads=4, q_lora=0, kv_lora=64,
    nope_dim=24, rope_dim=8, v_dim=32, experts=8, shared_experts=1, top_k=2, expert_ff=96,
    groups=1, kept_groups=1, route_scale=1.0, mtp_layers=1, init_std=0.04, max_length=1024),
  'small': dict(
    vocab_size=8192, layers=12, dense_layers=1, width=512, dense_ff=2048, heads=8, q_lora=256, kv_lora=128,
    nope_dim=64, rope_dim=32, v_dim=64, experts=16, shared_experts=1, top_k=4, expert_ff=288,
    groups=4, kept_groups=2, route_scale=2.5, mtp_layers=1, init_std=0.02, max_length=4096, remat='dots'),
  'v2_lite_16b': dict(
    vocab_size=102_400, layers=27, dense_layers=1, width=2048, dense_ff=10_944, heads=16, q_lora=0,
    kv_lora=512, nope_dim=128, rope_dim=64, v_dim=128, experts=64, shared_experts=2, top_k=6, expert_ff=1408,
    score='softmax', norm_top_k=False, route_scale=1.0, yarn=Yarn(mscale=0.707, mscale_all_dim=0.707),
    max_length=163_840, compute_dtype='bfloat16', remat='full'),
  'moonlight_16b': dict(
    vocab_size=163_840, layers=27, dense_layers=1, width=2048, dense_ff=11_264, heads=16, q_lora=0,
    kv_lora=512, nope_dim=128, rope_dim=64, v_dim=128, experts=64, shared_experts=2, top_k=6, expert_ff=1408,
    route_scale=2.446, rope_theta=50_000.0, norm_eps=1e-5, max_length=8192,
    compute_dtype='bfloat16', remat='full'),
  'v3_671b': dict(
    vocab_size=129_280, layers=61, dense_layers=3, width=7168, dense_ff=18_432, heads=128, q_lora=1536,
    kv_lora=512, nope_dim=128, rope_dim=64, v_dim=128, experts=256, shared_experts=1, top_k=8, expert_ff=2048,
    groups=8, kept_groups=4, route_scale=2.5, mtp_layers=1, yarn=Yarn(), max_length=163_840,
    compute_dtype='bfloat16', remat='full'),
}


def preset(name: str, **changes) -> ModelConfig:
  """The preset's config with `changes` laid over it. Raises ValueError for an unknown name."""
  need(name in PRESETS, f"no preset '{name}': use one of {', '.join(PRESETS)}")
  return ModelConfig(**{**PRESETS[name], **changes})
