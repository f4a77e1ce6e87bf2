"""The comparison's harness: what is counted, and that nothing is lost on the way."""
