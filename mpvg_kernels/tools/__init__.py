"""What is done with a run that is there: evaluate, predict, analyze, report, export; and `study`, which makes many.

One file a command. Imports run one way: models, analysis, train, tools.
"""
