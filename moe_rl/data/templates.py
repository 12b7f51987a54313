"""How a question becomes a prompt."""

R1_ZERO = (
  'A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant '
  'first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning '
  'process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., '
  '<think> reasoning process here </think> <answer> answer here </answer>. User: {prompt}. Assistant:')  # R1, table 1

TEMPLATES = {
  'r1_zero': R1_ZERO,
  'short': 'User:{prompt}Assistant:',  # for the tiny model: two tokens around the question
}


def render(template: str, question: str) -> str:
  """The prompt's text. Raises ValueError for an unknown template; braces in the question are left alone."""
  if template not in TEMPLATES:
    raise ValueError(f"config.template '{template}': use one of {', '.join(TEMPLATES)}")
  return TEMPLATES[template].replace('{prompt}', question)
