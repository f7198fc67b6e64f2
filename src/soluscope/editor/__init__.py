"""A page on this machine that shows a neuron on any text, and the differences when the text is edited.

compare.py pairs the tokens of two texts. models.py loads the models of a study's stored neurons. app.py is the
local web page, which also sends the study's neuron pages; serve.py runs it.
"""
