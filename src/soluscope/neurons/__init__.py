"""Neuron pages: examples, rules and effects, of each neuron of a run, computed once and stored in the run folder.

`scan` reads a text in blocks with flat memory. `look` returns to the chosen tokens for their context and effects.
`stored` reads the results without a model, for the site, the report and ratings.
"""
