"""What chips cost, and published yardsticks to read a plan against."""

# $ a chip-hour, on demand, in the cheapest region that has the generation, as commonly quoted from
# cloud.google.com/tpu/pricing in 2025 (only v4's was seen in a dated source: 2022). Not read again since, lists
# change and
# contracts differ: `--price` takes yours.
CHIP_HOUR: dict[str, float] = {'v4': 3.22, 'v5e': 1.20, 'v5p': 4.20, 'v6e': 2.70, 'tpu7x': 12.00}

# $ per million output tokens that the makers ask of others: R1 as DeepSeek priced it at its release, o1 likewise.
API_PER_MILLION: dict[str, float] = {'R1': 2.19, 'o1': 60.0}

# Output tokens a second of one node of 8 H800, mean over a day of DeepSeek's own serving of V3 and R1 (DeepSeek-AI,
# 'DeepSeek-V3/R1 Inference System Overview', 2025).
H800_NODE_TOKENS_PER_SECOND = 14_800

# Device kinds as jax names them, and the generation that the prices are of.
GENERATIONS = {'TPU v4': 'v4', 'TPU v5 lite': 'v5e', 'TPU v5e': 'v5e', 'TPU v5': 'v5p', 'TPU v5p': 'v5p',
               'TPU v6 lite': 'v6e', 'TPU v6e': 'v6e', 'TPU7x': 'tpu7x'}


def device_hour(config_price: float, device_kind: str) -> float:
  """$ of a device for an hour: the config's, or where that is 0 the table's above; 0.0 for what is in neither, such as
  a CPU. tpu7x is priced by the chip, of which jax sees two devices."""
  if config_price:
    return config_price
  generation = GENERATIONS.get(device_kind)
  return CHIP_HOUR.get(generation, 0.0) / (2 if generation == 'tpu7x' else 1)
