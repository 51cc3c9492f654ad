"""A linear SVM trained by HOGWILD! workers on state that they share, or do not share."""
