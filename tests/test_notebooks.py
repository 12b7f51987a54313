"""Notebooks run from top to bottom."""

import pathlib

import nbclient
import nbformat

ROOT = pathlib.Path(__file__).parents[1]


def test_the_curve_notebook_runs_and_draws(tmp_path, monkeypatch):
  monkeypatch.delenv('XLA_FLAGS', raising=False)  # compiled as for a reader
  monkeypatch.setenv('MOE_RL_WORKDIR', str(tmp_path / 'run'))
  monkeypatch.setenv('MOE_RL_FLAGS', '--config.rl.steps=2 --config.eval.problems=32')
  notebook = nbformat.read(ROOT / 'notebooks' / 'r1_zero_curve.ipynb', as_version=4)
  nbclient.NotebookClient(notebook, timeout=300, resources={'metadata': {'path': str(ROOT)}}).execute()
  outputs = [o for cell in notebook.cells if cell.cell_type == 'code' for o in cell.outputs]
  assert sum('image/png' in o.get('data', {}) for o in outputs) == 2
  assert any('last: step 2' in o.get('text', '') for o in outputs)
