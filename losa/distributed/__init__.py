"""Several processes: which launches are supported, how the processes wait, agree and share, and how they hold a model
together. Nothing else in losa asks for a rank."""
