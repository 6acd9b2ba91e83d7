"""The one loop, one step, state, saving, parallel, feed, health."""
