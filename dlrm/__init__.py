"""Make Criteo data, train a recommender on it, write a run folder."""
