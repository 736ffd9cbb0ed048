"""What a guarded step costs, as ratios measured in one run, so that they mean something on a noisy machine.

* :mod:`.timing`, :mod:`.counting`, :mod:`.machine`: interleaved repeats with quartiles, counts, where it ran;
* :mod:`.states`, :mod:`.keepers`: training states of several sizes, and the ways to keep a copy of one: ours, the
  rivals', and the machine's own limit;
* :mod:`.snapshot`, :mod:`.restore`, :mod:`.step`, :mod:`.scale`: the benchmarks; :mod:`.arms` are the training loops
  that are compared, :mod:`.ranks` runs them in several processes;
* :mod:`.recovery`: whole restarts of a job, of which one is :mod:`.starts`;
* :mod:`.pages`, :mod:`.command`: what a person sees.

Counts (collectives, reads by the host, allocations) are facts and are asserted in tests; times are only ever reported,
as ratios to something that was measured in the same run.
"""
