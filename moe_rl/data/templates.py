"""How a question becomes a prompt: as text (`render`), and as token ids in which only the template's own words can be
special tokens (`prompt_ids`)."""

import re

from moe_rl.data.chat import chat_parts
from moe_rl.data.tokenizer import Tokenizer

R1_ZERO = (
  'A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant '
  'first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning '
  'process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., '
  '<think> reasoning process here </think> <answer> answer here </answer>. User: {prompt}. Assistant:')  # R1, table 1

TEMPLATES = {
  'r1_zero': R1_ZERO,
  'short': 'User:{prompt}Assistant:',  # for the tiny model: two tokens around the question
}
CHATS = ('r1', 'r1_think', 'chat')  # r1_think: the answer is opened with '<think>\n'
NAMES = (*TEMPLATES, *CHATS)
TAGS = ('<think>', '</think>', '<answer>', '</answer>')  # words of an answer, which some vocabularies have as tokens
USER, ASSISTANT = '<｜User｜>', '<｜Assistant｜>'  # with the fullwidth bar U+FF5C


def render(template: str, question: str) -> str:
  """The prompt as text, for templates that are text. Raises ValueError for others; braces in the question stay."""
  if template not in TEMPLATES:
    raise ValueError(f"config.template '{template}': use one of {', '.join(TEMPLATES)}")
  return TEMPLATES[template].replace('{prompt}', question)


def prompt_ids(template: str, tokenizer: Tokenizer, question: str) -> list[int]:
  """Ids of the prompt that asks one question.

  A text template begins with bos where the model's texts do (`Tokenizer.adds_bos`), and its tags are tokens where the
  vocabulary has them. Raises ValueError for an unknown template, and where the tokenizer lacks what it needs.
  """
  if template in CHATS:
    return conversation_ids(template, tokenizer, [{'role': 'user', 'content': question}])
  parts = tokenizer.split(render(template, '{prompt}'), TAGS)
  parts = [part.replace('{prompt}', question) if isinstance(part, str) else part for part in parts]
  return tokenizer.encode_parts([tokenizer.bos_id, *parts] if tokenizer.adds_bos else parts)


def conversation_ids(template: str, tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
  """Ids of a conversation, at whose end the assistant is to speak.

  template: one of CHATS; messages: role 'system', 'user' or 'assistant', and content. Raises ValueError for other
  messages, and where the tokenizer lacks special tokens or a chat template, with the remedy.
  """
  for message in messages:
    if not all(isinstance(message.get(key), str) for key in ('role', 'content')) or not all(
        isinstance(text, str) for text in message.values()):
      raise ValueError(f'a message is a dict of strings with role and content, not {message!r}')
  if template == 'chat':
    return tokenizer.encode_parts(chat_parts(tokenizer, messages, TAGS))
  if template not in CHATS:
    raise ValueError(f"template '{template}': use one of {', '.join(CHATS)}")
  return tokenizer.encode_parts(_r1_parts(tokenizer, messages, '<think>\n' if template == 'r1_think' else '', template))


def _r1_parts(tokenizer: Tokenizer, messages, opened: str, template: str) -> list[str | int]:
  """R1's form: bos, system, then `<｜User｜>question<｜Assistant｜>answer` and eos, nothing between.

  Thoughts of earlier turns are left out: an answer begins after its last `</think>`.
  """
  lacking = [name for name in (USER, ASSISTANT) if name not in tokenizer.special]
  lacking += ['bos'] if tokenizer.bos_id is None else []
  if lacking:
    raise ValueError(f"config.template '{template}': {tokenizer.source} has no {', '.join(lacking)}: use a tokenizer "
                     "of DeepSeek V3, R1 or its distilled models, or config.template 'chat' or 'r1_zero'")
  user, assistant = tokenizer.special[USER], tokenizer.special[ASSISTANT]
  parts = [tokenizer.bos_id, '\n\n'.join(m['content'] for m in messages if m['role'] == 'system')]
  for message in messages:
    role, text = message['role'], message['content']
    if role == 'user':
      parts += [user, text]
    elif role == 'assistant':
      parts += [assistant, *tokenizer.split(text.rpartition('</think>')[2], TAGS), tokenizer.eos_id]
    elif role != 'system':
      raise ValueError(f"config.template '{template}': role '{role}': use system, user or assistant")
  return [*parts, assistant, *tokenizer.split(opened, TAGS)]


def opening(template: str, tokenizer: Tokenizer) -> str:
  """What a prompt already says of the answer: '<think>' and the space after it where the prompt ends so, else ''.

  With it a response is whole for whoever reads its tags.
  """
  return re.search(r'(?:<think>\s*)?\Z', tokenizer.decode(prompt_ids(template, tokenizer, '1+1=?')))[0]
