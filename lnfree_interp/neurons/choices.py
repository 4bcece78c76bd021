"""The names that ablations and their command take. Imports nothing heavy."""

ABLATIONS = ("mean", "zero")
METHODS = ("auto", "moments", "stream", "rerun")
