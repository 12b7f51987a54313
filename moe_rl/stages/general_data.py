"""General data for the tiny model, as a stage of a list: traces, preference pairs and prompts (`data.general`)."""

import json
import pathlib
import time

import jax

from moe_rl.data.general import write


def run(config, workdir, mesh) -> dict:
  """Writes general.jsonl, pairs.jsonl and prompts.jsonl into the workdir, whose summary names them."""
  path, c, started = pathlib.Path(workdir).absolute(), config.general_data, time.time()
  done = path / 'summary.json'
  if done.exists():
    return json.loads(done.read_text())
  summary = {'complete': True}
  if jax.process_index() == 0:
    summary |= {'lines': write(path, config.seed, c.traces, c.pairs, c.prompts), 'seconds': time.time() - started}
    done.write_text(json.dumps(summary, indent=1) + '\n')
  return summary
