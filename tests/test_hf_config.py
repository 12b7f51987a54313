"""config.json to and from ours: the released files give the presets, and what is not implemented is refused by name."""

import dataclasses
import re

import pytest

from moe_rl.models.config import PRESETS, ModelConfig, Yarn, preset
from moe_rl.models.hf_config import family, from_hf_config, to_hf_config

WHERE = '/models/x/config.json'
_DEEPSEEK = dict(
  attention_bias=False, attention_dropout=0.0, aux_loss_alpha=0.001, auto_map={'AutoConfig': 'x.Config'}, ep_size=1,
  hidden_act='silu', initializer_range=0.02, kv_lora_rank=512, model_type='deepseek_v3', moe_layer_freq=1,
  pretraining_tp=1, qk_nope_head_dim=128, qk_rope_head_dim=64, seq_aux=True, tie_word_embeddings=False,
  torch_dtype='bfloat16', transformers_version='4.33.1', use_cache=True, v_head_dim=128)
_SMALL_DEEPSEEK = _DEEPSEEK | dict(
  first_k_dense_replace=1, hidden_size=2048, moe_intermediate_size=1408, n_group=1, n_routed_experts=64,
  n_shared_experts=2, num_attention_heads=16, num_experts_per_tok=6, num_hidden_layers=27, num_key_value_heads=16,
  q_lora_rank=None, topk_group=1)
_DEEPSEEK_YARN = dict(beta_fast=32, beta_slow=1, factor=40, original_max_position_embeddings=4096, type='yarn')
_QWEN = dict(
  architectures=['Qwen2ForCausalLM'], attention_dropout=0.0, bos_token_id=151643, eos_token_id=151643,
  hidden_act='silu', initializer_range=0.02, max_position_embeddings=131072, max_window_layers=28, model_type='qwen2',
  rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=131072, tie_word_embeddings=False, torch_dtype='bfloat16',
  transformers_version='4.40.1', use_cache=True, use_mrope=False, use_sliding_window=False, vocab_size=152064)
_QWEN_1_5B = _QWEN | dict(
  hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_hidden_layers=28, num_key_value_heads=2,
  tie_word_embeddings=True, vocab_size=151936)
_QWEN3 = _QWEN | dict(
  attention_bias=False, head_dim=128, max_position_embeddings=40960, model_type='qwen3', num_attention_heads=16,
  num_hidden_layers=28, num_key_value_heads=8, rope_scaling=None, rope_theta=1000000, sliding_window=None,
  tie_word_embeddings=True, vocab_size=151936)
_LLAMA = dict(
  attention_bias=False, attention_dropout=0.0, bos_token_id=128000, eos_token_id=[128001, 128008, 128009],
  head_dim=128, hidden_act='silu', initializer_range=0.02, max_position_embeddings=131072, mlp_bias=False,
  model_type='llama', num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-05, rope_scaling=dict(
    factor=8.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192, rope_type='llama3'),
  rope_theta=500000.0, tie_word_embeddings=False, vocab_size=128256)

RELEASED: dict[str, dict] = {  # the fields of the released files, by preset
  'v3_671b': _DEEPSEEK | dict(
    first_k_dense_replace=3, hidden_size=7168, intermediate_size=18432, max_position_embeddings=163840,
    moe_intermediate_size=2048, n_group=8, n_routed_experts=256, n_shared_experts=1, norm_topk_prob=True,
    num_attention_heads=128, num_experts_per_tok=8, num_hidden_layers=61, num_key_value_heads=128,
    num_nextn_predict_layers=1, q_lora_rank=1536, quantization_config=dict(
      activation_scheme='dynamic', fmt='e4m3', quant_method='fp8', weight_block_size=[128, 128]),
    rms_norm_eps=1e-06, rope_scaling=_DEEPSEEK_YARN | dict(mscale=1.0, mscale_all_dim=1.0), rope_theta=10000,
    routed_scaling_factor=2.5, scoring_func='sigmoid', topk_group=4, topk_method='noaux_tc', vocab_size=129280),
  'moonlight_16b': _SMALL_DEEPSEEK | dict(
    intermediate_size=11264, max_position_embeddings=8192, norm_topk_prob=True, num_nextn_predict_layers=0,
    rms_norm_eps=1e-05, rope_scaling=None, rope_theta=50000.0, routed_scaling_factor=2.446, scoring_func='sigmoid',
    topk_method='noaux_tc', vocab_size=163840),
  'v2_lite_16b': _SMALL_DEEPSEEK | dict(
    intermediate_size=10944, max_position_embeddings=163840, model_type='deepseek_v2', norm_topk_prob=False,
    rms_norm_eps=1e-06, rope_scaling=_DEEPSEEK_YARN | dict(mscale=0.707, mscale_all_dim=0.707), rope_theta=10000,
    routed_scaling_factor=1.0, scoring_func='softmax', topk_method='greedy', vocab_size=102400),
  'qwen2_5_1_5b': _QWEN_1_5B,
  'qwen2_5_math_1_5b': _QWEN_1_5B | dict(max_position_embeddings=4096, rope_theta=10000, sliding_window=4096),
  'r1_distill_qwen_1_5b': _QWEN_1_5B | dict(rope_theta=10000, tie_word_embeddings=False),
  'qwen2_5_7b': _QWEN | dict(
    hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_hidden_layers=28, num_key_value_heads=4),
  'qwen2_5_14b': _QWEN | dict(
    hidden_size=5120, intermediate_size=13824, max_window_layers=48, num_attention_heads=40, num_hidden_layers=48,
    num_key_value_heads=8, rms_norm_eps=1e-05),
  'qwen2_5_32b': _QWEN | dict(
    hidden_size=5120, intermediate_size=27648, max_window_layers=64, num_attention_heads=40, num_hidden_layers=64,
    num_key_value_heads=8, rms_norm_eps=1e-05),
  'qwen3_0_6b': _QWEN3 | dict(hidden_size=1024, intermediate_size=3072),
  'qwen3_1_7b': _QWEN3 | dict(hidden_size=2048, intermediate_size=6144),
  'llama3_1_8b': _LLAMA | dict(
    hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_hidden_layers=32),
  'llama3_3_70b': _LLAMA | dict(
    hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_hidden_layers=80),
}


def sizes(model: ModelConfig, **changes) -> ModelConfig:
  """The model as a file describes it: without how it runs."""
  return dataclasses.replace(
    model, **dict(compute_dtype='float32', param_dtype='float32', remat='none', expert_path='auto') | changes)


@pytest.mark.parametrize('name', RELEASED)
def test_a_released_file_gives_the_preset(name):
  # A library's default stands for the spread of initial weights in DeepSeek's files; their papers say 0.006.
  assert from_hf_config(RELEASED[name], WHERE) == sizes(preset(name), init_std=0.02)


@pytest.mark.parametrize('name', PRESETS)
def test_a_written_config_is_read_back_as_it_was(name):
  model = preset(name)
  written = to_hf_config(model, dtype='bfloat16', bos_id=3, eos_id=[1, 2], pad_id=0)
  assert from_hf_config(written, WHERE) == sizes(model)
  assert written['model_type'] == family(model) and written['torch_dtype'] == 'bfloat16'
  assert (written['bos_token_id'], written['eos_token_id'], written['pad_token_id']) == (3, [1, 2], 0)


@pytest.mark.parametrize('name', ['v3_671b', 'llama3_1_8b', 'qwen2_5_7b'])
def test_both_notations_of_positions_are_read(name):
  released = dict(RELEASED[name])
  scaling = dict(released.pop('rope_scaling', None) or {})
  scaling |= {'rope_theta': released.pop('rope_theta'), 'rope_type': scaling.pop('type', None) or scaling.get(
    'rope_type', 'default')}
  new = released | {'rope_parameters': scaling}
  assert from_hf_config(new, WHERE) == from_hf_config(RELEASED[name], WHERE)
  both = new | {k: RELEASED[name].get(k) for k in ('rope_theta', 'rope_scaling')}
  assert from_hf_config(both, WHERE) == from_hf_config(RELEASED[name], WHERE)


def test_what_a_file_may_leave_out_has_the_librarys_default():
  short = {k: v for k, v in RELEASED['llama3_1_8b'].items()
           if k not in ('num_key_value_heads', 'head_dim', 'tie_word_embeddings', 'rope_scaling', 'rope_theta')}
  model = from_hf_config(short, WHERE)
  assert (model.kv_heads, model.head_dim, model.tied, model.rope_theta, model.llama3) == (32, 128, False, 10_000, None)


def test_yarn_without_magnitudes_scales_the_rotation_by_its_factor():
  """As Qwen 2.5's cards tell to extend the context: factor 4 over 32,768 tokens."""
  scaling = dict(type='yarn', factor=4.0, original_max_position_embeddings=32768)
  model = from_hf_config(RELEASED['qwen2_5_7b'] | dict(rope_scaling=scaling), WHERE)
  assert model.yarn == Yarn(factor=4.0, original_length=32_768, mscale=1.0, mscale_all_dim=0.0)
  assert model.softmax_scale == 128**-0.5
  assert from_hf_config(to_hf_config(model, dtype='float32'), WHERE) == model


def test_a_sliding_window_that_no_layer_uses_is_none():
  changed = RELEASED['qwen2_5_7b'] | dict(use_sliding_window=True, layer_types=['full_attention'] * 28)
  assert from_hf_config(changed, WHERE) == from_hf_config(RELEASED['qwen2_5_7b'], WHERE)


REFUSED = {  # preset, changes, words of the message after the path
  'family': ('qwen2_5_7b', dict(model_type='gpt_neox'), 'model_type "gpt_neox": is not implemented, only deepseek_v3'),
  'sliding window': ('qwen2_5_7b', dict(use_sliding_window=True, max_window_layers=21),
                     'use_sliding_window true: a sliding window is not implemented'),
  'layer types': ('qwen3_0_6b', dict(layer_types=['full_attention', 'sliding_attention']),
                  'layer_types ["full_attention", "sliding_attention"]: only full_attention'),
  'window of another family': ('llama3_1_8b', dict(sliding_window=4096), 'sliding_window 4096: is not known here'),
  'attention bias': ('llama3_1_8b', dict(attention_bias=True), 'attention_bias true: is not implemented, only false'),
  'feed-forward bias': ('llama3_1_8b', dict(mlp_bias=True), 'mlp_bias true: is not implemented'),
  'dropout': ('qwen2_5_7b', dict(attention_dropout=0.1), 'attention_dropout 0.1: is not implemented, only 0.0'),
  'activation': ('qwen2_5_7b', dict(hidden_act='gelu'), 'hidden_act "gelu": is not implemented, only "silu"'),
  'unknown rope': ('llama3_1_8b', dict(rope_scaling=dict(rope_type='longrope', factor=2.0)),
                   "rope_scaling: rope_type \"longrope\": of llama only 'default' and 'yarn' and 'llama3'"),
  'rope by its old name': ('qwen2_5_7b', dict(rope_scaling=dict(type='linear', factor=2.0)), 'only'),
  'rope of another family': ('v3_671b', dict(rope_scaling=_LLAMA['rope_scaling']),
                             "rope_scaling: rope_type \"llama3\": of deepseek_v3 only 'default' and 'yarn'"),
  'rope detail': ('qwen2_5_7b', dict(rope_scaling=dict(rope_type='default', mrope_section=[16, 24])),
                  'rope_scaling: mrope_section [16, 24]: is not known here'),
  'rope a layer type': ('qwen3_0_6b', dict(rope_parameters=dict(full_attention=dict(rope_theta=1.0))),
                        'only one set of values for all layers'),
  'partial rope': ('llama3_1_8b', dict(partial_rotary_factor=0.5), 'partial_rotary_factor 0.5: is not implemented'),
  'magnitude': ('v3_671b', dict(rope_scaling=_DEEPSEEK_YARN | dict(mscale_all_dim=1.0)),
                'rope_scaling: mscale null: give it beside mscale_all_dim'),
  'one magnitude': ('v3_671b', dict(rope_scaling=_DEEPSEEK_YARN | dict(mscale=0.7)), 'mscale 0.7: without mscale_all_'),
  'attention factor': ('qwen2_5_7b', dict(rope_scaling=_DEEPSEEK_YARN | dict(attention_factor=1.2)),
                       'attention_factor 1.2: is not implemented'),
  'untruncated': ('qwen2_5_7b', dict(rope_scaling=_DEEPSEEK_YARN | dict(truncate=False)), 'truncate false: is not'),
  'two ropes': ('llama3_1_8b', dict(rope_parameters=dict(rope_type='default', rope_theta=1.0)),
                'it contradicts rope_parameters: leave one out'),
  'rope without a factor': ('llama3_1_8b', dict(rope_scaling=dict(rope_type='llama3')), 'factor is missing'),
  'selection': ('v2_lite_16b', dict(topk_method='noaux_tc'), 'topk_method "noaux_tc": is not implemented, only greedy'),
  'scores': ('v3_671b', dict(scoring_func='softmax'), 'scoring_func "softmax": is not implemented, only "sigmoid"'),
  'normalised softmax': ('v2_lite_16b', dict(norm_topk_prob=True), 'norm_topk_prob true: is not implemented'),
  'every other layer': ('v3_671b', dict(moe_layer_freq=2), 'moe_layer_freq 2: is not implemented, only 1'),
  'predictions': ('v3_671b', dict(num_nextn_predict_layers=3), 'num_nextn_predict_layers 3: one prediction module'),
  'half-split weights': ('v3_671b', dict(rope_interleave=False), 'rope_interleave false: is not implemented'),
  'grouped latents': ('v3_671b', dict(num_key_value_heads=8), 'num_key_value_heads 8: is not implemented, only 128'),
  'quantised': ('qwen2_5_7b', dict(quantization_config=dict(quant_method='gptq', bits=4)),
                "quantization_config {\"quant_method\": \"gptq\", \"bits\": 4}: only quant_method 'fp8'"),
  'other blocks': ('v3_671b', dict(quantization_config=dict(quant_method='fp8', weight_block_size=[64, 64])),
                   'with weight_block_size [128, 128]'),
  'unknown field': ('llama3_1_8b', dict(attn_logit_softcapping=50.0), 'attn_logit_softcapping 50.0: is not known here: '
                    'remove it if it changes nothing in the forward pass'),
  'missing': ('qwen2_5_7b', dict(hidden_size=None), 'hidden_size is missing: is this the whole config.json'),
  'text for a number': ('qwen2_5_7b', dict(num_hidden_layers='28'), 'num_hidden_layers "28": must be a whole number'),
  'number for a flag': ('qwen2_5_7b', dict(tie_word_embeddings=1), 'tie_word_embeddings 1: must be true or false'),
  'sizes that cannot be': ('qwen2_5_7b', dict(num_key_value_heads=5), 'config.model: heads 28 do not divide over kv_h'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_is_not_implemented_is_refused_with_the_file_and_the_field(name):
  base, changes, words = REFUSED[name]
  with pytest.raises(ValueError, match='^' + re.escape(WHERE) + '.*' + re.escape(words)):
    from_hf_config(RELEASED[base] | changes, WHERE)


def test_a_file_of_another_kind_is_refused():
  with pytest.raises(ValueError, match=r'holds \[1\], not a JSON object'):
    from_hf_config([1], WHERE)


@pytest.mark.parametrize('base, changes, words', [
  ('qwen2_5_7b', dict(qk_norm=True), 'config.model.qk_norm: no Hugging Face family holds such a model'),
  ('v2_lite_16b', dict(norm_top_k=True), 'config.model.norm_top_k: .* False with softmax scores'),
  ('v2_lite_16b', dict(mtp_layers=1), 'config.model.mtp_layers: .* 0 with softmax scores'),
  ('v3_671b', dict(yarn=Yarn(mscale=0.5, mscale_all_dim=0.0)), 'config.model.yarn.mscale: ')])
def test_a_model_that_no_family_holds_is_refused(base, changes, words):
  with pytest.raises(ValueError, match=words):
    to_hf_config(preset(base, **changes), dtype='bfloat16')
