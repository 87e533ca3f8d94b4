"""How good a model is: problems, accuracies with honest intervals, and the table of models and capabilities."""
