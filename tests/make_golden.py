"""Makes tests/data/golden_families.npz with `transformers`: python tests/make_golden.py

Needs torch and transformers (see .ci/run); the tests that read the file do not. Float32, plain attention and experts.
"""

import json
import pathlib
import tempfile

import numpy as np
import safetensors
import torch
from families import CASES, GOLDEN, NEW, PROMPTS, batch, positions, prompts, targets, write_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import MtpModel

PLAIN = dict(attn_implementation='eager', experts_implementation='eager', dtype=torch.float32)
# Logits that a relative 1e-5 on the routers' weights may move at most. Two experts that nearly tie would move them by
# tenths, and then rounding on another machine could too.
STABLE = 0.01


def checkpoint(case: str, folder: pathlib.Path) -> tuple[dict, dict]:
  """(config.json, shapes by name) as `save_pretrained` writes them, and in `folder` with `families.numbers` in them."""
  config = dict(CASES[case])
  AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop('model_type'), **config)).save_pretrained(folder)
  config = json.loads((folder / 'config.json').read_text())
  with safetensors.safe_open(folder / 'model.safetensors', framework='numpy') as file:
    shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
  if config.get('num_nextn_predict_layers'):
    shapes |= prediction_module(shapes, config)
  write_checkpoint(folder, config, shapes)
  return config, shapes


def prediction_module(shapes: dict, config: dict) -> dict:
  """Names and shapes of DeepSeek-V3's prediction module, which `save_pretrained` leaves out: a layer's and its own. The
  released copies of embedding and head are left out here."""
  layers, width = config['num_hidden_layers'], config['hidden_size']
  last, own = f'model.layers.{layers - 1}.', f'model.layers.{layers}.'
  return {own + name.removeprefix(last): shape for name, shape in shapes.items() if name.startswith(last)} | {
    own + 'enorm.weight': [width], own + 'hnorm.weight': [width], own + 'shared_head.norm.weight': [width],
    own + 'eh_proj.weight': [width, 2 * width]}


def load(folder: pathlib.Path):
  model = AutoModelForCausalLM.from_pretrained(folder, **PLAIN)
  return model.eval()


def forward(model) -> torch.Tensor:
  """Logits [N, L, V] of the batch."""
  ids, valid = (torch.from_numpy(a) for a in batch())
  return model(ids.long(), attention_mask=valid.long(), position_ids=torch.from_numpy(positions(valid.numpy())).long(),
               use_cache=False).logits


def reference(folder: pathlib.Path) -> dict:
  """What `families.golden` describes, but for config and shapes."""
  model = load(folder)
  ids, valid = (torch.from_numpy(a) for a in batch())
  logits, counted = forward(model), torch.from_numpy(targets(valid.numpy()))
  logp = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None].long())[..., 0]
  (-(logp * counted).sum() / counted.sum()).backward()
  out = dict(logits=logits.detach().numpy(), logprobs=logp.detach().numpy(), gradients=gradients(model),
             greedy=greedy(model), second=second(model, folder))
  return out


def gradients(model) -> dict[str, float]:
  """Norms by the tensor's name in a file: fused experts apart."""
  out = {}
  for name, parameter in model.named_parameters():
    g = parameter.grad.double()
    if name.endswith('experts.gate_up_proj'):
      for e in range(g.shape[0]):
        for part, half in zip(('gate_proj', 'up_proj'), g[e].chunk(2, dim=0), strict=True):
          out[f'{name.removesuffix("gate_up_proj")}{e}.{part}.weight'] = half.norm().item()
    elif name.endswith('experts.down_proj'):
      out |= {f'{name.removesuffix("down_proj")}{e}.down_proj.weight': g[e].norm().item() for e in range(g.shape[0])}
    else:
      out[name] = g.norm().item()
  return out


@torch.no_grad()
def greedy(model) -> np.ndarray:
  """int32 [3, 64] by the library's own generation with its cache; prompts are padded left, as it wants them."""
  ids, longest = prompts(), PROMPTS.max()
  left = np.stack([np.roll(row, longest - n) for row, n in zip(ids, PROMPTS, strict=True)])
  mask = np.arange(longest) >= longest - PROMPTS[:, None]
  out = model.generate(torch.from_numpy(left).long(), attention_mask=torch.from_numpy(mask).long(), do_sample=False,
                       max_new_tokens=NEW, use_cache=True, pad_token_id=0, eos_token_id=None)
  return out[:, longest:].numpy().astype(np.int32)


@torch.no_grad()
def second(model, folder: pathlib.Path) -> np.ndarray:
  """Logits [L - 1, V] of the prediction module on the full row; [0] without one."""
  if not getattr(model.config, 'num_nextn_predict_layers', 0):
    return np.zeros(0, np.float32)
  # How it tells the module's tensors apart, for V3's depth only.
  model._keys_to_ignore_on_load_unexpected = [rf'model\.layers\.{model.config.num_hidden_layers}\.']
  module = MtpModel.from_pretrained(model).eval()
  ids = torch.from_numpy(batch()[0][:1]).long()
  hidden = model(ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
  position = torch.arange(1, ids.shape[1])[None]
  out = module.forward_layer(0, hidden[:, :-1], position, None, input_ids=ids[:, 1:])
  return module._project_to_logits(out)[0].numpy()


@torch.no_grad()
def check_stable(folder: pathlib.Path, logits: np.ndarray):
  """Raises RuntimeError if a choice of experts hangs by less than rounding."""
  torch.manual_seed(0)
  for _ in range(4):
    model = load(folder)
    for name, parameter in model.named_parameters():
      if name.endswith('mlp.gate.weight'):
        parameter.mul_(1 + 1e-5 * torch.randn_like(parameter))
    moved = np.abs(forward(model).numpy() - logits)[batch()[1]].max()
    if moved > STABLE:
      raise RuntimeError(f'{folder}: a choice of experts hangs by a thread (logits move by {moved:.3g})')


def main():
  out = {}
  for case in CASES:
    with tempfile.TemporaryDirectory() as folder:
      folder = pathlib.Path(folder)
      config, shapes = checkpoint(case, folder)
      record = reference(folder)
      check_stable(folder, record['logits'])
    valid = batch()[1]
    record['logits'][~valid] = 0  # what stands on padding means nothing
    record['logprobs'][~targets(valid)] = 0
    print(f'{case}: logits up to {np.abs(record["logits"]).max():.1f}, {len(np.unique(record["greedy"]))} greedy ids')
    for name, value in {**record, 'config': config, 'shapes': shapes}.items():
      out[f'{case}/{name}'] = np.array(json.dumps(value)) if isinstance(value, dict) else value
  np.savez_compressed(GOLDEN, **out)
  print(f'{GOLDEN}: {GOLDEN.stat().st_size:,} bytes')


if __name__ == '__main__':
  main()
