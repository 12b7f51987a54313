"""Rule-based rewards, graded in worker processes that can be killed."""
