"""Export a trained model as a folder that other tools load: merged, written, loaded back, compared."""
