"""The one agent loop: collection, evaluation and the interactive test all drive `rollout.rollout`."""
