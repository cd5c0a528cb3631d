"""The cluster-level scheduler: which worker prefills a request, which decodes it, and what happens
to it until it is done. Pure: no I/O, no clock, no vLLM. Events go in, actions come out; the router
carries them out, and whatever else drives it (tests, a simulator) gets the same decisions."""
