"""Members: the processes that hold the models of a sharing experiment."""
