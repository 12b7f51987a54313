"""config.json of a Hugging Face checkpoint to and from `ModelConfig`, for the five families that the model serves.

Released files and those that `transformers` 5 writes are both read: rope_theta and rope_scaling, or rope_parameters.
What the model does not compute is refused by name, and so is any field that is not known here unless its value is null,
false, 0 or empty: a field that goes unread is how a model comes out slightly wrong.
"""

import json

from moe_rl.models.config import Llama3Rope, ModelConfig, Yarn

ARCHITECTURES = {
  'deepseek_v3': 'DeepseekV3ForCausalLM', 'deepseek_v2': 'DeepseekV2ForCausalLM', 'qwen2': 'Qwen2ForCausalLM',
  'qwen3': 'Qwen3ForCausalLM', 'llama': 'LlamaForCausalLM'}
LATENT = ('deepseek_v3', 'deepseek_v2')
# Fields that change no number of the forward pass: files, ids, training, what `transformers` returns.
IGNORED = frozenset(
  '''architectures auto_map bos_token_id eos_token_id pad_token_id unk_token_id torch_dtype dtype transformers_version
  use_cache tokenizer_class name_or_path aux_loss_alpha seq_aux router_aux_loss_coef ep_size
  pretraining_tp output_router_logits output_attentions output_hidden_states return_dict id2label label2id problem_type
  task_specific_params chunk_size_feed_forward finetuning_task unsloth_version unsloth_fixed model_name'''.split())


def from_hf_config(config: dict, where: str) -> ModelConfig:
  """The sizes that a config.json gives; how the model runs (dtypes, remat, expert path) is at ModelConfig's defaults.

  config: the parsed file; where: its path, for messages. `mtp_layers` is what the file claims: `transformers` writes
  num_nextn_predict_layers 1 also beside weights that have no prediction module, so a reader of weights looks at them.
  Raises ValueError naming `where`, the field, its value and what would do.
  """
  fields = _Fields(config, where)
  kind = fields.choice('model_type', tuple(ARCHITECTURES))
  sizes = dict(
    vocab_size=fields.whole('vocab_size'), layers=fields.whole('num_hidden_layers'), width=fields.whole('hidden_size'),
    dense_ff=fields.whole('intermediate_size'), heads=fields.whole('num_attention_heads'),
    tied=fields.flag('tie_word_embeddings'), norm_eps=fields.number('rms_norm_eps'),
    max_length=fields.whole('max_position_embeddings'), init_std=fields.number('initializer_range', 0.02))
  fields.must('hidden_act', 'silu')
  for name, only in (('attention_bias', False), ('mlp_bias', False), ('attention_dropout', 0.0)):
    fields.must(name, only)
  _check_quantization(fields)
  sizes |= _latent(fields, kind, sizes) if kind in LATENT else _grouped(fields, kind, sizes)
  sizes |= _positions(fields, kind, sizes['max_length'])
  fields.refuse_unread()
  try:
    return ModelConfig(**sizes)
  except ValueError as e:
    raise ValueError(f'{where}: {e}') from e


def _latent(fields, family, sizes):
  """MLA and experts of DeepSeek V2 and V3."""
  fields.must('num_key_value_heads', sizes['heads'])
  fields.must('rope_interleave', True)
  fields.must('moe_layer_freq', 1)
  fields.skip('head_dim', 'qk_head_dim')  # derived, or a note of `transformers` to itself
  groups, kept = fields.whole('n_group', 1), fields.whole('topk_group', 1)
  if family == 'deepseek_v3':
    fields.must('topk_method', 'noaux_tc')
    fields.must('scoring_func', 'sigmoid')
    kind = dict(score='sigmoid', norm_top_k=fields.flag('norm_topk_prob', True), mtp_layers=_prediction_layers(fields))
  else:
    fields.must('scoring_func', 'softmax')
    # With it, DeepSeek's code divides by the sum and leaves out the scale, and `transformers` does neither.
    fields.must('norm_topk_prob', False)
    if fields.choice('topk_method', ('greedy', 'group_limited_greedy'), 'greedy') == 'greedy':
      groups = kept = 1
    kind = dict(score='softmax', norm_top_k=False)
  return kind | dict(
    dense_layers=fields.whole('first_k_dense_replace', 0), q_lora=fields.whole('q_lora_rank', 0),
    kv_lora=fields.whole('kv_lora_rank'), nope_dim=fields.whole('qk_nope_head_dim'),
    rope_dim=fields.whole('qk_rope_head_dim'), v_dim=fields.whole('v_head_dim'),
    experts=fields.whole('n_routed_experts'), shared_experts=fields.whole('n_shared_experts', 0),
    top_k=fields.whole('num_experts_per_tok'), expert_ff=fields.whole('moe_intermediate_size'), groups=groups,
    kept_groups=kept, route_scale=fields.number('routed_scaling_factor', 1.0))


def _prediction_layers(fields):
  names = ('num_nextn_predict_layers', 'num_mtp_layers')
  name = next((n for n in names if n in fields.config), names[0])
  layers = fields.whole(name, 0)
  fields.need(layers <= 1, name, 'one prediction module is implemented: give 0 to read the main model alone')
  return layers


def _grouped(fields, family, sizes):
  """GQA of Qwen and Llama."""
  heads = sizes['heads']
  head_dim = fields.whole('head_dim', 0) or sizes['width'] // heads
  if family != 'llama':
    sliding, window_from = fields.flag('use_sliding_window'), fields.whole('max_window_layers', sizes['layers'])
    fields.need(not sliding or window_from >= sizes['layers'], 'use_sliding_window',
                'a sliding window is not implemented: set it to false if the full context is meant')
    fields.skip('sliding_window')
  kinds = fields.config.get('layer_types') or []
  fields.skip('layer_types')
  fields.need(all(kind == 'full_attention' for kind in kinds), 'layer_types', 'only full_attention is implemented')
  kv_heads = fields.whole('num_key_value_heads', heads) if family == 'llama' else fields.whole('num_key_value_heads')
  return dict(attention='gqa', dense_layers=sizes['layers'], kv_heads=kv_heads, head_dim=head_dim,
              qkv_bias=family == 'qwen2', qk_norm=family == 'qwen3')


def _check_quantization(fields):
  given = fields.config.get('quantization_config')
  fields.skip('quantization_config')
  if given:
    kind = given if isinstance(given, dict) else {}
    fields.need((kind.get('quant_method'), kind.get('fmt', 'e4m3'), kind.get('weight_block_size'))
                == ('fp8', 'e4m3', [128, 128]), 'quantization_config',
                "only quant_method 'fp8' (e4m3) with weight_block_size [128, 128] is implemented")


def _positions(fields, family, max_length):
  """rope_theta, yarn, llama3. Where a file has both kinds of notation, they must agree."""
  theta = fields.number('rope_theta', 10_000.0)
  fields.must('partial_rotary_factor', 1.0)
  found = []
  for name in ('rope_parameters', 'rope_scaling'):
    given = fields.config.get(name)
    fields.skip(name)
    if given:
      fields.need(isinstance(given, dict) and not any(isinstance(v, dict) for v in given.values()), name,
                  'only one set of values for all layers is implemented')
      found.append(_scaling(_Fields(given, f'{fields.where}: {name}'), family, theta, max_length))
  fields.need(len(found) < 2 or found[0] == found[1], 'rope_scaling', 'it contradicts rope_parameters: leave one out')
  return found[0] if found else dict(rope_theta=theta)


def _scaling(rope, family, theta, max_length):
  rope.skip('type')
  kind = rope.config.get('rope_type') or rope.config.get('type') or 'default'
  rope.skip('rope_type')
  rope.must('partial_rotary_factor', 1.0)
  out = dict(rope_theta=rope.number('rope_theta', theta))
  if kind == 'yarn':
    out['yarn'] = _yarn(rope, max_length)
  elif kind == 'llama3' and family not in LATENT:
    out['llama3'] = Llama3Rope(
      factor=rope.number('factor'), low_freq_factor=rope.number('low_freq_factor'),
      high_freq_factor=rope.number('high_freq_factor'),
      original_length=rope.whole('original_max_position_embeddings', max_length))
  else:
    known = "'default' and 'yarn'" + (" and 'llama3'" if family not in LATENT else '')
    rope.need(kind == 'default', 'rope_type', f'of {family} only {known} are implemented')
  rope.refuse_unread()
  return out


def _yarn(rope, max_length):
  original = rope.whole('original_max_position_embeddings', max_length)
  factor = rope.number('factor', max_length / original)
  rope.must('truncate', True)
  rope.must('attention_factor', None)
  mscale, all_dim = rope.number('mscale', None), rope.number('mscale_all_dim', 0.0)
  if all_dim:  # without the other one, implementations disagree on the rotation's magnitude
    rope.need(mscale, 'mscale', 'give it beside mscale_all_dim')
  else:
    rope.need(mscale in (None, 1.0), 'mscale', 'without mscale_all_dim only 1 is defined: give both')
  return Yarn(factor=factor, original_length=original, beta_fast=rope.number('beta_fast', 32.0),
              beta_slow=rope.number('beta_slow', 1.0), mscale=mscale or 1.0, mscale_all_dim=all_dim)


class _Fields:
  """A JSON object that knows which of its fields were read. A null is as good as an absent field."""

  def __init__(self, config: dict, where: str):
    if not isinstance(config, dict):
      raise ValueError(f'{where}: holds {_short(config)}, not a JSON object: give the config.json of a checkpoint')
    self.config, self.where, self.read = config, where, set()

  def need(self, ok, name: str, remedy: str):
    if not ok:
      raise ValueError(f'{self.where}: {name} {_short(self.config.get(name))}: {remedy}')

  def skip(self, *names: str):
    self.read.update(names)

  def _get(self, name, default):
    self.read.add(name)
    value = self.config.get(name)
    if value is None:
      if default is _REQUIRED:
        raise ValueError(f'{self.where}: {name} is missing: is this the whole config.json of the checkpoint?')
      return default
    return value

  def whole(self, name: str, *default) -> int:
    value = self._get(name, *default or (_REQUIRED,))
    self.need(isinstance(value, int) and not isinstance(value, bool) and value >= 0, name, 'must be a whole number')
    return value

  def number(self, name: str, *default) -> float | None:
    value = self._get(name, *default or (_REQUIRED,))
    if value is None:
      return None
    self.need(isinstance(value, (int, float)) and not isinstance(value, bool), name, 'must be a number')
    return float(value)

  def flag(self, name: str, default: bool = False) -> bool:
    value = self._get(name, default)
    self.need(isinstance(value, bool), name, 'must be true or false')
    return value

  def choice(self, name: str, options: tuple[str, ...], *default) -> str:
    value = self._get(name, *default or (_REQUIRED,))
    self.need(value in options, name, f'is not implemented, only {", ".join(options)}')
    return value

  def must(self, name: str, only):
    """The one value that is implemented; absent and null say the same."""
    value = self._get(name, only)
    self.need(value == only, name, f'is not implemented, only {json.dumps(only)}')

  def refuse_unread(self):
    for name in sorted(self.config.keys() - self.read - IGNORED):
      self.need(name.startswith('_') or not self.config[name], name,
                'is not known here: remove it if it changes nothing in the forward pass')


_REQUIRED = object()


def _short(value) -> str:
  text = json.dumps(value, default=repr)
  return text if len(text) <= 80 else text[:77] + '...'


def family(model: ModelConfig) -> str:
  """The `model_type` whose files can hold this model. Raises ValueError where none can, with the field to change."""
  if model.attention == 'mla':
    if model.score == 'sigmoid':
      return 'deepseek_v3'
    _exportable(not model.norm_top_k, 'norm_top_k', 'False with softmax scores, as DeepSeek V2 has it')
    _exportable(not model.mtp_layers, 'mtp_layers', '0 with softmax scores, as DeepSeek V2 has it')
    return 'deepseek_v2'
  _exportable(not (model.qkv_bias and model.qk_norm), 'qk_norm', 'False with qkv_bias: Qwen2 has one, Qwen3 the other')
  return 'qwen2' if model.qkv_bias else 'qwen3' if model.qk_norm else 'llama'


def _exportable(ok, name, wanted):
  if not ok:
    raise ValueError(f'config.model.{name}: no Hugging Face family holds such a model; it would have to be {wanted}')


def to_hf_config(model: ModelConfig, *, dtype: str, bos_id: int | None = None, eos_id: int | list[int] | None = None,
                 pad_id: int | None = None) -> dict:
  """config.json of the model, as the hub's files are written; `from_hf_config` gives the sizes back.

  dtype: of the weights beside it, 'bfloat16' or 'float32'. Raises ValueError as `family` does.
  """
  kind = family(model)
  out = {
    'architectures': [ARCHITECTURES[kind]], 'model_type': kind, 'torch_dtype': dtype, 'bos_token_id': bos_id,
    'eos_token_id': eos_id, 'pad_token_id': pad_id, 'vocab_size': model.vocab_size, 'hidden_size': model.width,
    'intermediate_size': model.dense_ff, 'num_hidden_layers': model.layers, 'num_attention_heads': model.heads,
    'tie_word_embeddings': model.tied, 'rms_norm_eps': model.norm_eps, 'max_position_embeddings': model.max_length,
    'initializer_range': model.init_std, 'hidden_act': 'silu', 'attention_dropout': 0.0, 'use_cache': True,
    'rope_theta': model.rope_theta, 'rope_scaling': _scaling_json(model)}
  out |= _latent_json(model, kind) if kind in LATENT else _grouped_json(model, kind)
  return dict(sorted(out.items()))


def _latent_json(model, kind):
  out = {
    'attention_bias': False, 'num_key_value_heads': model.heads, 'first_k_dense_replace': model.dense_layers,
    'q_lora_rank': model.q_lora or None, 'kv_lora_rank': model.kv_lora, 'qk_nope_head_dim': model.nope_dim,
    'qk_rope_head_dim': model.rope_dim, 'v_head_dim': model.v_dim, 'n_routed_experts': model.experts,
    'n_shared_experts': model.shared_experts, 'num_experts_per_tok': model.top_k,
    'moe_intermediate_size': model.expert_ff, 'moe_layer_freq': 1, 'n_group': model.groups,
    'topk_group': model.kept_groups, 'norm_topk_prob': model.norm_top_k, 'routed_scaling_factor': model.route_scale,
    'scoring_func': model.score}
  if kind == 'deepseek_v3':
    return out | {'topk_method': 'noaux_tc', 'num_nextn_predict_layers': model.mtp_layers}
  return out | {'topk_method': 'group_limited_greedy' if model.groups > 1 else 'greedy'}


def _grouped_json(model, kind):
  out = {'num_key_value_heads': model.kv_heads}
  if kind != 'qwen2' or model.head_dim * model.heads != model.width:
    out['head_dim'] = model.head_dim
  if kind != 'qwen2':
    out['attention_bias'] = False
  return out | ({'mlp_bias': False} if kind == 'llama' else {'use_sliding_window': False})


def _scaling_json(model):
  if model.llama3:
    r = model.llama3
    return {'rope_type': 'llama3', 'factor': r.factor, 'low_freq_factor': r.low_freq_factor,
            'high_freq_factor': r.high_freq_factor, 'original_max_position_embeddings': r.original_length}
  if not model.yarn:
    return None
  y = model.yarn
  out = {'type': 'yarn', 'rope_type': 'yarn', 'factor': y.factor, 'original_max_position_embeddings': y.original_length,
         'beta_fast': y.beta_fast, 'beta_slow': y.beta_slow}
  _exportable(y.mscale == 1.0 if not y.mscale_all_dim else y.mscale, 'yarn.mscale',
              '1 without mscale_all_dim, else not 0')
  return out | ({'mscale': y.mscale, 'mscale_all_dim': y.mscale_all_dim} if y.mscale_all_dim else {})
