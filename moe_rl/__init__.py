"""moe_rl: DeepSeek-R1 on TPUs, in JAX. Nothing is imported here: reward workers start without jax."""

__version__ = '0.1.0'
