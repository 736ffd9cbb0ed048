"""Which rule sees a bad update, how early, and how often it refuses a good one.

* :mod:`.workloads`, :mod:`.events`, :mod:`.recordings`: small training runs, what is done to them, what is kept;
* :mod:`.contestants`, :mod:`.open_loop`: the rules, and every one of them replayed over the same recordings;
* :mod:`.noise`, :mod:`.fixtures`: synthetic series without any fault, and a public trace with one;
* :mod:`.tables`, :mod:`.figures`, :mod:`.command`: what a person sees.

Open loop means that a refusal changes nothing about what comes next. That is fair to every rule and blind to what
rollback does; the closed loop is measured beside it.
"""
