"""Blind rating of neurons by people, after Elhage et al. 2022, sections 6.1 and 6.4.

plan.py draws the items that people judge, and database.py keeps the plan and the ratings. app.py is the local web
page, behind the guard of serving/. analysis.py, agreement.py and power.py are the statistics; records.py turns
ratings into records of the study. scored.py and calibration.py compute the automatic proxies of `soluscope.proxies`
and measure how far each agrees with known answers and with ratings.
"""
