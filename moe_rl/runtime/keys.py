"""Random keys by address: fold_in of (run seed, purpose, …). A key is never carried from step to step, so slot, batch
order, mesh and restart change no draw."""

import jax

PURPOSES = ('init', 'rollout', 'eval', 'sample', 'chat')


def key_for(seed: int, purpose: str, *address: int | jax.Array) -> jax.Array:
  """A typed key for a purpose and an address of integers (traced ones are fine)."""
  key = jax.random.fold_in(jax.random.key(seed), PURPOSES.index(purpose))
  for part in address:
    key = jax.random.fold_in(key, part)
  return key
