"""Looking into attention: what a trained model attends to, drawn and measured."""
