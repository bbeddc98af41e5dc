"""A rank that only monitors: python -m tests.support.monitored RANK PEERS TOKEN SILENT

Connects to the ranks of PEERS (JSON by number), monitors them, and prints who is lost.
"""

from __future__ import annotations

import json
import socket
import sys

from runkey.training import rank_monitor
from runkey.training.rank_monitor import Peer, RankMonitor, connect_ranks


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(rank: int, cards: dict[str, dict[str, object]], token: str, silent: float) -> None:
    rank_monitor.SILENT_SECONDS, rank_monitor.BEAT_SECONDS = silent, 0.1
    listener = socket.create_server(("127.0.0.1", 0))
    peers = {int(number): Peer.from_dict(card) for number, card in cards.items()}
    peers[rank] = rank_monitor.local_peer(rank)
    links = connect_ranks(rank, peers, listener, token, 60)
    monitor = RankMonitor(rank, peers, links)
    say("connected")
    monitor._found.wait()
    lost = monitor.lost()
    say(lost.text if lost else "nobody")


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3], float(sys.argv[4]))
