"""The model's sizes, as data: one frozen record for every family member, and the presets by name."""

import dataclasses
import math

REMAT = ('none', 'dots', 'halves', 'full')


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
class Llama3Rope:
  """Llama 3.1's context extension: pairs that turn fewer than `low_freq_factor` times over the original context are
  slowed by `factor`, those that turn more than `high_freq_factor` times stay, linear between. Length in tokens."""

  factor: float = 8.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_length: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Sizes of one Transformer: DeepSeek V2 and V3 (arXiv:2412.19437, sec. 2.1 and 4.2), or a dense Qwen or Llama.

  Latent attention (`attention` 'mla') reads q_lora to v_dim, grouped-query attention ('gqa') kv_heads to llama3; what
  belongs to the other kind stays at 0. A dense model has dense_layers == layers and no experts.
  """

  vocab_size: int
  layers: int
  dense_layers: int  # the first ones, with a plain SwiGLU in place of experts
  width: int  # D
  dense_ff: int  # SwiGLU width of the dense layers
  heads: int  # H
  q_lora: int = 0  # rank of the query's down-projection; 0: queries come straight from the hidden state
  kv_lora: int = 0  # C, the cached latent
  nope_dim: int = 0  # per head, without position
  rope_dim: int = 0  # R, per head for queries, one shared key head
  v_dim: int = 0
  experts: int = 0  # E, routed
  shared_experts: int = 0  # fused into one SwiGLU of width shared_experts * expert_ff
  top_k: int = 1  # K
  expert_ff: int = 0
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

  attention: str = 'mla'  # 'mla' (latent, DeepSeek) or 'gqa' (grouped queries, Qwen and Llama)
  kv_heads: int = 0  # key and value heads, each read by heads / kv_heads query heads
  head_dim: int = 0  # of queries, keys and values
  qkv_bias: bool = False  # Qwen2
  qk_norm: bool = False  # RMSNorm of each head's query and key before they turn: Qwen3
  tied: bool = False  # the embedding is the output matrix too
  head: str = 'vocabulary'  # logits; or 'scalar': one number a token in their place, which makes a reward model
  llama3: Llama3Rope | None = None

  # How it runs; changes no number beyond rounding.
  compute_dtype: str = 'float32'
  param_dtype: str = 'float32'
  # 'none', 'dots' (keep matrix products), 'halves' (keep the inputs of attention and of feed-forward) or 'full' (keep
  # layer inputs only)
  remat: str = 'none'
  expert_path: str = 'auto'  # 'auto', 'ragged', 'rounds' or 'dense': see moe.experts

  @property
  def qk_dim(self) -> int:
    return self.nope_dim + self.rope_dim

  @property
  def rotary_dim(self) -> int:
    """Coordinates of a head that turn with position."""
    return self.rope_dim if self.attention == 'mla' else self.head_dim

  @property
  def latent_dim(self) -> int:
    """Z, cached numbers a token a layer: normed latent and rotated shared key, or every key and value head."""
    return self.kv_lora + self.rope_dim if self.attention == 'mla' else 2 * self.kv_heads * self.head_dim

  @property
  def moe_layers(self) -> int:
    return self.layers - self.dense_layers

  @property
  def softmax_scale(self) -> float:
    """qk_dim^-0.5, times YaRN's squared magnitude over all dimensions where YaRN is on; with gqa head_dim^-0.5."""
    if self.attention == 'gqa':
      return self.head_dim**-0.5
    m = 1.0 if self.yarn is None else yarn_magnitude(self.yarn.factor, self.yarn.mscale_all_dim)
    return self.qk_dim**-0.5 * m * m

  def __post_init__(self):
    need(self.attention in ('mla', 'gqa'), f"attention '{self.attention}': use 'mla' or 'gqa'")
    (self._check_latent if self.attention == 'mla' else self._check_grouped)()
    need(0 <= self.dense_layers <= self.layers, f'dense_layers {self.dense_layers} not in 0..{self.layers}')
    need(self.score in ('sigmoid', 'softmax'), f"score '{self.score}': use 'sigmoid' or 'softmax'")
    need(self.remat in REMAT, f"remat '{self.remat}': use one of {', '.join(REMAT)}")
    need(self.expert_path in ('auto', 'ragged', 'rounds', 'dense'),
         f"expert_path '{self.expert_path}': use 'auto', 'ragged', 'rounds' or 'dense'")
    need(self.mtp_layers in (0, 1), f'mtp_layers {self.mtp_layers}: only 0 and 1 exist')
    need(self.head in ('vocabulary', 'scalar'), f"head '{self.head}': use 'vocabulary' or 'scalar'")
    need(self.head == 'vocabulary' or not self.mtp_layers,
         f"head 'scalar' predicts no token: set mtp_layers {self.mtp_layers} to 0")
    if self.moe_layers or self.mtp_layers:
      self._check_experts()

  def _check_latent(self):
    need(self.rope_dim % 2 == 0, f'rope_dim {self.rope_dim} must be even')
    for field in ('kv_lora', 'nope_dim', 'rope_dim', 'v_dim'):
      need(getattr(self, field) > 0, f"{field} {getattr(self, field)} must be positive with attention 'mla'")
    self._check_unused(GQA_FIELDS, 'gqa')

  def _check_grouped(self):
    need(self.kv_heads > 0 and self.heads % self.kv_heads == 0,
         f'heads {self.heads} do not divide over kv_heads {self.kv_heads}: change one of them')
    need(self.head_dim > 0 and self.head_dim % 2 == 0, f'head_dim {self.head_dim} must be even and positive')
    need(self.yarn is None or self.llama3 is None, 'yarn and llama3 are two ways to scale positions: leave one out')
    if self.llama3:
      low, high = self.llama3.low_freq_factor, self.llama3.high_freq_factor
      need(0 < low < high, f'llama3: low_freq_factor {low} must be under high_freq_factor {high}, and positive')
    self._check_unused(MLA_FIELDS, 'mla')

  def _check_unused(self, fields: tuple[str, ...], kind: str):
    for field in fields:
      need(not getattr(self, field),
           f"{field} {getattr(self, field)} belongs to attention '{kind}' and this is '{self.attention}': leave it out")

  def _check_experts(self):
    need(self.experts > 0, f'experts {self.experts}, but {self.moe_layers + self.mtp_layers} layers have experts: '
                           'set it, or dense_layers = layers and mtp_layers = 0')
    need(self.experts % self.groups == 0,
         f'experts {self.experts} do not divide into {self.groups} groups: change experts or groups')
    need(1 <= self.kept_groups <= self.groups, f'kept_groups {self.kept_groups} not in 1..{self.groups}')
    reachable = self.experts // self.groups * self.kept_groups
    need(1 <= self.top_k <= reachable,
         f'top_k {self.top_k} needs 1..{reachable} experts in the kept groups: lower top_k or keep more groups')


MLA_FIELDS = ('q_lora', 'kv_lora', 'nope_dim', 'rope_dim', 'v_dim')
GQA_FIELDS = ('kv_heads', 'head_dim', 'qkv_bias', 'qk_norm', 'llama3')
MOE_FIELDS = ('experts', 'shared_experts', 'top_k', 'expert_ff', 'groups', 'kept_groups', 'score', 'norm_top_k',
              'route_scale', 'mtp_layers', 'expert_path')


def own_fields(config: ModelConfig) -> dict:
  """The fields that this kind of model reads, sections (yarn, llama3) as dicts. ModelConfig's defaults are the rest."""
  hidden = {'attention', 'tied', *GQA_FIELDS} if config.attention == 'mla' else {*MLA_FIELDS}
  hidden |= {'head'}
  if not config.experts:
    hidden |= {*MOE_FIELDS}
  default = {f.name: f.default for f in dataclasses.fields(config)}
  return {k: v for k, v in dataclasses.asdict(config).items() if k not in hidden or v != default[k]}


def from_fields(fields: dict) -> ModelConfig:
  """The config of fields as `own_fields` or `dataclasses.asdict` give them. Raises TypeError for an unknown field."""
  sections = {key: kind(**fields[key]) if fields.get(key) else None
              for key, kind in (('yarn', Yarn), ('llama3', Llama3Rope))}
  return ModelConfig(**fields | sections)


def need(ok: bool, message: str):
  """Raises ValueError with `message`, prefixed by its section, unless ok."""
  if not ok:
    raise ValueError(f'config.model: {message}')


def yarn_magnitude(factor: float, mscale: float) -> float:
  """m(x) = 0.1 x ln(factor) + 1 for factor > 1 (YaRN sec. 3.4, as DeepSeek generalises it)."""
  return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


_QWEN = dict(attention='gqa', head_dim=128, rope_theta=1e6, init_std=0.02, compute_dtype='bfloat16', remat='full')
_QWEN2_1_5B = dict(
  **_QWEN, vocab_size=151_936, layers=28, dense_layers=28, width=1536, dense_ff=8960, heads=12, kv_heads=2,
  qkv_bias=True, tied=True, max_length=131_072)
_QWEN2_7B = dict(
  **_QWEN, vocab_size=152_064, layers=28, dense_layers=28, width=3584, dense_ff=18_944, heads=28, kv_heads=4,
  qkv_bias=True, max_length=131_072)
_MATH = dict(rope_theta=10_000.0, max_length=4096)
_QWEN3 = dict(
  **_QWEN, vocab_size=151_936, layers=28, dense_layers=28, heads=16, kv_heads=8, qk_norm=True, tied=True,
  max_length=40_960)
_LLAMA = dict(
  attention='gqa', vocab_size=128_256, head_dim=128, kv_heads=8, rope_theta=500_000.0, llama3=Llama3Rope(),
  norm_eps=1e-5, init_std=0.02, max_length=131_072, compute_dtype='bfloat16', remat='full')

# Sizes of the released models are those of their config.json; `tiny`, `tiny_dense` and `small` are ours.
PRESETS: dict[str, dict] = {
  'tiny': dict(
    vocab_size=384, layers=3, dense_layers=1, width=128, dense_ff=256, heads=4, q_lora=0, kv_lora=64,
    nope_dim=16, rope_dim=16, v_dim=32, experts=8, shared_experts=1, top_k=2, expert_ff=96, rope_theta=200.0,
    groups=1, kept_groups=1, route_scale=1.0, mtp_layers=1, init_std=0.04, max_length=1024),
  'tiny_dense': dict(  # a student for `tiny`: its vocabulary, a Qwen3 in small
    attention='gqa', vocab_size=384, layers=4, dense_layers=4, width=96, dense_ff=256, heads=4, kv_heads=2, head_dim=24,
    qk_norm=True, tied=True, rope_theta=200.0, init_std=0.04, max_length=1024),
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
    compute_dtype='bfloat16', remat='halves'),
  'qwen2_5_1_5b': _QWEN2_1_5B,
  'qwen2_5_math_1_5b': _QWEN2_1_5B | _MATH,
  'r1_distill_qwen_1_5b': _QWEN2_1_5B | dict(rope_theta=10_000.0, tied=False),
  'qwen2_5_7b': _QWEN2_7B,
  'qwen2_5_math_7b': _QWEN2_7B | _MATH,
  'qwen2_5_14b': _QWEN2_7B | dict(
    layers=48, dense_layers=48, width=5120, dense_ff=13_824, heads=40, kv_heads=8, norm_eps=1e-5),
  'qwen2_5_32b': _QWEN2_7B | dict(
    layers=64, dense_layers=64, width=5120, dense_ff=27_648, heads=40, kv_heads=8, norm_eps=1e-5),
  'qwen3_0_6b': dict(**_QWEN3, width=1024, dense_ff=3072),
  'qwen3_1_7b': dict(**_QWEN3, width=2048, dense_ff=6144),
  'llama3_1_8b': dict(**_LLAMA, layers=32, dense_layers=32, width=4096, dense_ff=14_336, heads=32),
  'llama3_3_70b': dict(**_LLAMA, layers=80, dense_layers=80, width=8192, dense_ff=28_672, heads=64),
}


def preset(name: str, **changes) -> ModelConfig:
  """The preset's config with `changes` laid over it. Raises ValueError for an unknown name."""
  need(name in PRESETS, f"no preset '{name}': use one of {', '.join(PRESETS)}")
  return ModelConfig(**{**PRESETS[name], **changes})
