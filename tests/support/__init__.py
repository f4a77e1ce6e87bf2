"""What works with what: combinations that are really trained, replayed, attributed and compared with the oracle."""
