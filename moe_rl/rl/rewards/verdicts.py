"""What a check can come to. Every sample gets exactly one verdict, and all are counted."""

CORRECT = 'correct'
WRONG = 'wrong'
UNPARSABLE_ANSWER = 'unparsable_answer'
UNPARSABLE_REFERENCE = 'unparsable_reference'
TIMEOUT = 'timeout'
CRASH = 'crash'
OPEN = 'open'  # there is nothing to check; counted only where there are such prompts
VERDICTS = (CORRECT, WRONG, UNPARSABLE_ANSWER, UNPARSABLE_REFERENCE, TIMEOUT, CRASH)
