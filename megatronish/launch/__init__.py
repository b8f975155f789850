"""The life of a process of a run: its rank, the rendezvous with the others, consensus, the watchdog, the exit."""
