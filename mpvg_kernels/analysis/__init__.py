"""What the position embedding does in a model: quantities (the paper's, with their equations), probe (reads them from a
model at work), figures (draws them).

Nothing here knows of runs or of training: a model and images are enough.
"""
