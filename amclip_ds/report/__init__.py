"""`amclip report`: a run, or several, as one HTML file that needs nothing else. Loads no torch.

read.py reads a run's folder, incidents.py folds its incidents, time_spent.py adds up its time, events.py lists what
happened in order, charts.py draws, page.py fills page.html. A picture of a run's masks comes from what the run stored
(RUN/pictures).
"""
