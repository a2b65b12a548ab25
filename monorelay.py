#!/usr/bin/env python3
# coding: utf-8 (for Python 2, whose SyntaxError then shows the line with the version that is needed)  # noqa: UP009
"""MonoRelay: one file between Anthropic and OpenAI clients and the providers that its owner configured.

    python monorelay.py                          serve ./relay.json (or the one beside this file)
    python monorelay.py route MODEL              say where a request for it would go
    python monorelay.py check                    say what would be served, or what is wrong
    python monorelay.py usage --days 7           what was used and what it cost, from the ledger
    python monorelay.py hash-password            a scrypt hash for relay.json
    python monorelay.py token USER --expires 30d a JWT for a user of relay.json

Three storeys, of rooms that know only those above them:

    ┌ decides  limits · errors · config · auth · routing · key pool · ledger rules · HTTP/1.1 · headers passed on ·
    │          JSON bodies · event streams · formats · records · echo      no socket, clock, file or environment
    ├ waits    event loop · writers · request body · upstream · relay · catalogue
    └ runs     responses · service · endpoints · handler · server · processes · page · command line

The way of a request:

    RelayServer.process_request   a connection is accepted; a Handler serves it as a task of the EventLoop
    Handler._next_head            waits for a whole head
    Handler._serve_request        makes an Exchange, in which all stands that is known of the request
    Handler._respond              reads the head strictly, finds the endpoint, asks who calls
    answer_by_model               an endpoint: reads the body for its model
    relay_by_model                turns the model into targets, then candidates: a target with a key
    Relay.obtain                  takes candidate after candidate, until one's response isn't a failure
    Attempt.run                   sends the request on a kept or a new connection, reads the head, and judges it
    Handler._send                 sends the Response as it comes; an Outgoing makes bytes of it
    Service.conclude              a line in the log, whatever has happened; a row in the ledger; what is counted
"""

import array
import base64
import bisect
import codecs
import collections
import contextlib
import datetime
import decimal
import difflib
import email.utils
import errno
import fnmatch
import functools
import gc
import getopt
import hashlib
import hmac
import html
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import math
import mmap
import operator
import os
import random
import re
import select
import selectors
import shlex
import signal
import socket
import ssl
import stat
import struct
import sys
import textwrap
import threading
import time
import types
import warnings
import zlib
from collections.abc import AsyncIterator, Collection, Coroutine, Generator, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, Callable, NamedTuple, NoReturn, Optional, TypeVar, Union
from urllib.parse import parse_qsl, quote, unquote, unquote_to_bytes, urlsplit

try:
    from compression import zstd  # type: ignore[import-not-found]  # novm
except ImportError:  # Python before 3.14, or built without it
    zstd = None
try:
    import sqlite3  # here and for all, since a reload may begin a ledger, and nothing is imported while serving
except ImportError:  # Python built without it
    sqlite3 = None  # type: ignore[assignment]

if sys.version_info < (3, 9):  # noqa: UP036
    sys.exit(f"MonoRelay needs Python 3.9 or later, this is {sys.version.split()[0]}")

import graphlib  # which an older one lacks

__version__ = "1.0.0"

MEGABYTE = 1024 * 1024

Pairs = list[tuple[str, str]]  # header fields in their order, repetitions kept
JsonDict = dict[str, Any]


# ==== Limits =====================================================================================
#
# Each is a size in bytes, a count or a time in seconds. The comment above it or behind it, which goes on where the
# name ends, says what is bounded, and why there or whom it follows.

# nginx's large_client_header_buffers allows 8 KiB a line; long ids and queries get twice that.
REQUEST_LINE_BYTES = 16 * 1024
CONNECTION_CHARACTERS = 512  # of the Connection fields; most have some 30
PATH_ESCAPES = 512  # percent-encoded characters in a path: each is looked at several times
# Tomcat and gunicorn stop at 8 KiB, h11 at 16; a cookie-laden browser and long beta lists need more.
REQUEST_HEAD_BYTES = 64 * 1024
LONG_HEAD_BYTES = 8 * 1024  # a longer one waits for the turn of others, also of a client that has shown a token
# Apache's LimitRequestFields is 100; http.client's own limit, 100, has bitten users of other relays.
REQUEST_HEAD_FIELDS = 200
# Providers are trusted more than clients: http.client allows 100 lines of 64 KiB, curl 300 KiB.
RESPONSE_HEAD_BYTES = 256 * 1024
RESPONSE_HEAD_FIELDS = 1000
KEPT_FIELDS = 64  # of a head, and as many options of its Connection, are kept one by one; most have some 30 and one
INTERIM_RESPONSES = 20  # a 103 or a 102 now and then is normal; an endless row of them is not
INTERIM_SECONDS = 60.0  # in which so many may come: some providers send a 102 every 15 seconds while they work
TRAILER_BYTES = 8 * 1024  # of a request's trailer fields, which are checked and dropped: nobody needs them to be long
CHUNK_LINE_BYTES = 4096  # of a chunk's size and extensions; h11 stops at a line of 20 hex digits and 4 KiB
EVENT_NAME_BYTES = 256  # of a line that names an event; the usual ones have up to 60
HELD_BACK_SECONDS = 0.1  # for which the end of a piece of a body waits for what follows, if it may belong to a key
STREAM_LINE_BYTES = 64 * 1024  # a longer line of a stream goes out in pieces: memory stays bounded whatever arrives
LABORIOUS_LINES = 2000  # or chunks, in what has come at once: they may take 0.3 ms
LINES_AT_ONCE = 5000  # of them are decoded at a time, which takes 2 ms where the chunks have one byte each
USAGE_BYTES = 16 * 1024  # of a response's usage object; some have 1,500
USAGE_USUAL_BYTES = 2 * 1024  # of one that is kept as it was read; and of a whole response, to be looked through anew
USAGE_USUAL_VALUES = 50  # of the former: each takes up to 100 bytes; the usual ones have up to 40
USAGE_NAME_BYTES = 320  # of the names before it, or of a model or a service tier
FEW_USAGES = 4  # are read wherever they stand
USAGES_AT_ONCE = 32  # the last ones of what has come at once: some servers send one with each word
ERRORS_AT_ONCE = 32  # the same of what looks like an error in a chunk of chat
URLS_AT_ONCE = 500  # the first results_url and the like of what has come at once; a batch takes some 400 bytes
TRANSLATED_FIRST_BYTES = 1024  # of a stream, until it is known how long its events are for the client
TRANSLATED_AT_ONCE_BYTES = 16 * 1024  # which takes some milliseconds; a longer body is translated in a thread,
TRANSLATED_SOON_BYTES = 256 * 1024  # in another one if it is longer than this,
TRANSLATED_SOON_VALUES = 15_000  # or has more values, which may take 0.1 s; of a short one, marks in strings count, too
TRANSLATED_LATE_VALUES = 25_000  # and in a third one if it has more than these, which may take seconds,
TRANSLATED_LATE_BYTES = 1024 * 1024  # or is longer: a text in it may be JSON with as many, to be read, too
PING_SECONDS = 15.0  # without an event in a translated stream; Claude Code tells its user of 20
ENDING_SECONDS = 2.0  # after the finish_reason of a translated stream, for the usage or [DONE] that may follow
RECEIVE_BYTES = 64 * 1024  # of one recv: a TLS record is 16 KiB, four of them make system calls rare
TLS_RECEIVE_BYTES = 16 * 1024  # one record's; of the shortest ones, which may cost 10 µs each, it holds some 600
COPIED_BYTES = 16 * 1024  # of a message that is copied if that makes a system call less
JSON_VALUES = 1_000_000  # a JSON body of more takes a second to walk; the largest conversations have some 100,000
INTEGER_DIGITS = 64  # of an integer that is read: long ones take time in proportion to the square of their length
INFLATED_BYTES = 64 * 1024  # of content that are decompressed at a time,
INFLATED_FROM_BYTES = 16 * 1024  # from so many at most, which take 4 ms where blocks hold nothing but a code
ZSTD_WINDOW_LOG = 23  # 8 MiB, the largest window that a sender may use (RFC 9659 §3)
FORM_SEEN_BYTES = 64 * 1024  # of a form are read for its model, which stands before its file
FORM_FIELD_BYTES = 4096  # of the header of a part in it, and of the model
FORM_PARTS = 100  # are looked at; most forms have two or three
# What is held of a side that sends faster than the other takes it, or of a client that sends ahead.
HELD_BYTES = 256 * 1024
UNKNOWN_HELD_BYTES = 16 * 1024  # the same of a client that hasn't shown a token: a head's worth, and mostly far less
# Free memory goes back to the system when bodies have released so much, else now and then: it takes some milliseconds.
TRIMMED_BYTES = 16 * 1024 * 1024
TRIM_SECONDS = 30.0
# To find objects that only hold each other, Python looks at all of them, which takes up to 40 µs for each connection,
# and holds up all threads. There are hardly any: it is done while there are no more connections, else once an hour.
COLLECTED_CONNECTIONS = 500
COLLECTED_SECONDS = 3600.0
AHEAD_SECONDS = 0.5  # between two checks whether a client with a full buffer has left
# Between two sweeps over the deadlines of all tasks, at most and at least. A sweep takes time in proportion to the
# tasks, which is little up to some 10,000; for many more, a heap of deadlines would be due.
SWEEP_SECONDS = 5.0
TICK_SECONDS = 0.005
PATIENT_SECONDS = 0.005  # of a turn of the event loop, for work that is done in steps, and behind results of threads
QUEUE_SECONDS = 0.002  # for one of several queues, before the next one has its turn
POSTED_SECONDS = 0.005  # of a turn, to queue new connections and results of threads; as much to begin the former
ACCEPTING_SECONDS = 0.01  # of a turn that is late, to accept connections: some 400
SWEEPING_SECONDS = 0.005  # of a turn, for tasks whose deadline has passed
SENDING_SECONDS = 0.015  # of a turn, for what was put off in it; the rest goes out in the next one
# Of each thread, as glibc has it by default. With musl's 1 MB, or under a low `ulimit -s`, nested JSON that `json` of
# CPython 3.13 still reads would overflow it, which ends the process.
STACK_BYTES = 8 * 1024 * 1024
SWITCH_SECONDS = 0.0005  # for so long, a computing thread keeps the loop waiting for the GIL; CPython's default is 5 ms
OTHER_THREADS_SECONDS = 0.0001  # after which other threads have their turn
SLOW_EVENT_SECONDS = 0.002  # a connection whose last event took longer shares PATIENT_SECONDS, too
LATE_SECONDS = 0.015  # of a turn; connections that aren't served by then come first in the next one
# Of an error's body so much is looked at before it is passed on, and waited for no longer than this.
PEEKED_BYTES = 64 * 1024
PEEK_SECONDS = 5.0
ERROR_BYTES = 8 * 1024  # a longer one isn't read for its type
# An unread body up to this size is read and dropped to keep the connection; nginx closes lingering.
DISCARDED_BODY_BYTES = 64 * 1024
DISCARD_SECONDS = 0.5  # a short body that was sent has arrived by then
SHARES_AT_ONCE = 32  # users' shares of connections that are counted to make room; each takes 0.3 ms for 4,096 of them
# To make room for others, those idle for longer are closed first, then those busy for longer without a token.
UNPROVEN_SECONDS = 1.0
UNPROVEN_LEAST_SECONDS = 0.25  # the same if there are none: thousands of heads may begin within a second
HEAD_SECONDS = 20.0  # Apache's RequestReadTimeout header=20
BODY_PAUSE_SECONDS = 60.0  # nginx's client_body_timeout
IDLE_SECONDS = 75.0  # nginx's keepalive_timeout
STALLED_CLIENT_SECONDS = 60.0  # nginx's send_timeout
# When a client has let an answer wait for longer in all, a provider that breaks off may have done so for that: ASP.NET
# gives up after 5 s, HAProxy and nginx after some 60.
HELD_UP_SECONDS = 2.0
LINGER_SECONDS = 5.0  # nginx's lingering_timeout
LINGER_LONGEST_SECONDS = 30.0  # nginx's lingering_time
UPSTREAM_IDLE_SECONDS = 50.0  # of a kept upstream connection; common balancers drop theirs after 60 s
UPSTREAM_KEPT_SECONDS = 600.0  # after which an idle one is closed all the same: a name may lead elsewhere by now
BODY_END_SECONDS = 1.0  # for the end of a body to come behind a stream that has said that it is over,
BODY_END_BYTES = 16 * 1024  # and for what may stand between the two
LEFT_SECONDS = 0.5  # for more of a whole answer whose client has left to come,
LEFT_LONGEST_SECONDS = 10.0  # and for all of it
STALE_SECONDS = 1.0  # within which a kept connection shows that it was closed: a round trip, and a lost packet
LOST_SECONDS = 5.0  # after which a kept connection is looked at on which no answer comes,
LOST_RESENDS = 5  # and is given up if this system has sent so often what nobody acknowledges: for some 6 s
UNTAKEN_SECONDS = 20.0  # for which a kept connection takes nothing of a request, until another one gets it
# The rest of a request is given up when a provider that has begun a good response takes nothing of it for so long: some
# begin at once and are busy then, and a lossy network may pause for as long.
UNWANTED_SECONDS = 20.0
CONNECTED_ADDRESSES = 16  # of a host that has more, these are tried
ADDRESS_SECONDS = 1.0  # that each of many addresses gets at first: a round trip by satellite takes 0.7 s
AVOIDED_SECONDS = 600.0  # for which an address that took no connection is tried after the others of its host
AVOIDED_ADDRESSES = 1024  # beyond so many, all are taken for good again
LOOKUP_DESCRIPTORS = 8  # if there are fewer, a name that isn't found may be there all the same
UPSTREAM_IDLE_CONNECTIONS = 512  # to a provider, that wait for their next use; nginx needs as many for the same load
OVER_LIMIT_CONNECTIONS = 256  # accepted beyond max_connections, only to answer 503 in the client's format
OVER_LIMIT_SECONDS = 2.0  # for which the request of such a connection is waited for, and then its end
# Of an IPv6 address, that say whose turn it is. A customer may have a /48, with 65,536 networks of 64 bits: if each had
# turns, others would wait for thousands of connections of one. It has 256 of these, as large as most homes get.
TURN_BITS = 56
LISTEN_BACKLOG = 4096  # connections that wait for accept(); the system caps it (net.core.somaxconn)
RETRY_AFTER_LIMIT_SECONDS = 3600.0
LEEWAY_SECONDS = 60.0  # clocks of token issuers differ; RFC 7519 §4.1.4 allows a few minutes
ACCESS_TOKEN_SECONDS = 3600  # for which a token of a login is valid, and
REFRESH_TOKEN_SECONDS = 30 * 86400  # the one by which the client gets another
JWT_SECRET_BYTES = 32  # RFC 7518 §3.2: a key at least as long as the hash
JWT_BYTES = 8 * 1024  # as long as a header line may be for nginx; an access key isn't longer either
JWT_HEADER_BYTES = 512  # of it, which is read before anybody is known; the usual ones have 36
SHOWN_TOKENS = 2  # one in `Authorization`, one in `x-api-key`
KEY_CHARACTERS = 16  # the least of a user's key, and of the owner's where the relay listens beyond this machine
CATALOGUE_BYTES = 2 * 1024 * 1024  # of a provider's list; the longest known has 1 MB
CATALOGUE_VALUES = 100_000  # which `json` reads in some 10 ms
LISTED_MODELS = 1000  # of a provider; the longest known list has some 500
LISTED_ENTRY_CHARACTERS = 2048  # in its strings; the usual ones have 100 to 1,000
LISTED_ENTRY_VALUES = 128  # the usual ones have up to 80
LISTED_ENTRY_BYTES = 20  # that an entry takes while somebody's list is made, until it is written
CATALOGUE_WAIT_SECONDS = 2.0  # Claude Code gives up after 3
CATALOGUE_FRESH_SECONDS = 300.0  # for which a provider's list is taken for true
CATALOGUE_RETRY_SECONDS = 30.0  # until a provider that didn't list its models is asked again
LOGINS_PER_USER = 10  # a minute, for each address: nobody can lock a user out from elsewhere
LOGINS_PER_ADDRESS = 30  # a minute
LOGINS_WAITING = 16  # for their password to be hashed, which takes 50 ms each; half of them from one site
LOGIN_BODY_BYTES = 16 * 1024  # who logs in hasn't shown a token yet
SECRET_FILE_CHARACTERS = 64 * 1024  # of a file that ${file:PATH} names
SECRET_CHARACTERS = 8  # of one that is looked for in errors; shorter ones may be words that stand anywhere
RATE_LIMIT_FIELDS = 40  # of a response that are remembered; Anthropic sends some 20
SITE_BITS = 48  # of an IPv6 address: the most that one customer gets (RFC 6177)
TRUSTED_ADDRESSES = 1000  # from which somebody has logged in: others can't take all the places where they wait
THROTTLED_NAMES = 4096  # of addresses and users, whose last minute is remembered
THROTTLED_PROBES = 64  # rows in which a name may be counted: to look into each of thousands takes milliseconds
THROTTLED_CHARACTERS = 200  # of each
COMPARED_PRODUCT = 100_000  # of characters, for "did you mean": 20 ms at worst, 250 names of the usual length
COMPARED_CHARACTERS = 64  # of a name; a longer one is close to none
COMPARED_PATTERNS = 50  # the first ones, by what they begin with
LISTED_NAMES = 8  # in a message
TELLING_PATH_CHARACTERS = 200  # of a path, by which it is told which format and page it is for
MODEL_CHARACTERS = 256  # of a model's name; the longest known ones, ARNs of inference profiles, have some 120
# Of a worker, for what has to be known soon, and as much for the rest; the system gives memory only for what is used.
BOARD_PLACE_BYTES = 5 * 1024 * 1024
BOARD_READS = 3  # of a place that is being written meanwhile
SHARED_SECONDS = 1.0  # between two times that a worker shows what it has counted
SHARED_SOON_SECONDS = 0.025  # the same for cooldowns, and for what was spent while the ledger fails
LOOKED_SECONDS = 0.01  # between two looks at what the other workers have shown
SUMMED_SECONDS = 0.2  # how long the sum of what all have counted is kept: to make it may take 10 ms
BUDGETS_AT_ONCE = 50  # users whose budgets are looked up at a time, which takes up to 2 ms
TALLIED_MODELS = 100  # that metrics tell apart, besides those that relay.json names
TALLIED_MODELS_OF_ONE = 50  # of them, for which one user was the first to ask
TALLIED_USERS = 100  # the same of users who aren't in relay.json
TALLIED_NAME_BYTES = 200  # of either, as JSON; the longest known names of models have some 120
TALLIED_SERIES = 1000  # users with their models, providers and keys; besides, users, and models with their providers
METRIC_LINES = 1000  # that are written at a time, which takes 3 ms
TALLIED_HOURS = 48  # the last ones, for the page
RUNNING_ROWS = 200  # running requests that a page is told of
ROWS_AT_ONCE = 1000  # in one response of /api/requests
QUERY_FIELDS = 16  # of a request that the relay itself answers
PAGES = 50  # that may follow /api/live
LIVE_SECONDS = 1.0  # between two ticks of it
LIVE_QUIET_SECONDS = 15.0  # without a tick; then a comment shows that the connection is still there
LIVE_LATE_SECONDS = 3  # from the end of a request until all workers know of it, at most
HOURS_SECONDS = 10.0  # between two looks into the ledger
FIRST_ROWS = 50  # requests that a page is told of at first
ENDED_ROWS = 500  # requests that have ended, for the page
COUNTED_ROWS = 100  # that are counted together; takes up to 4 ms where no two are alike
LOG_PAUSE_SECONDS = 0.1  # lines are written together, so that a busy relay wakes its log thread rarely
LOG_LAST_SECONDS = 1.0  # at the end, for lines that are not yet written
PIPE_BYTES = getattr(select, "PIPE_BUF", 4096)  # that are written to a pipe in one piece, whoever else writes to it
STUCK_SECONDS = 5.0  # after which the end doesn't wait for the event loop; a whole machine may stand still for some
# Who ends a process may send it two signals for one: `timeout` to it and to its group, npm beside its terminal's.
TOGETHER_SECONDS = 0.05  # within which they count once
CUT_SECONDS = 2 * LOG_LAST_SECONDS  # within which a worker must have logged what it cuts, and ended
CUT_NAMED = 5  # requests whose ids one line of the log has room for
CUT_LINES = 1000  # requests that are logged when they are cut at the end
WARNING_SECONDS = 60.0  # between two warnings of one kind, where each connection or write may bring one
DESCRIPTOR_PAUSE_SECONDS = 0.05  # before the next connection is looked at then
LOG_VALUE_CHARACTERS = 200  # of one in a line; what is longer is cut
LOG_LINE_BYTES = 4096  # PIPE_BYTES of Linux
LOG_VALUE_BYTES = 240  # of each of 13 values in a line that would be longer
LOGGED_CHARACTERS = LOG_VALUE_CHARACTERS + 1  # of a text from outside so much is kept, which shows that it was longer
# What waits for a stderr that is blocked; lines beyond either are dropped, and counted.
LOG_BACKLOG_LINES = 4000
LOG_BACKLOG_CHARACTERS = 4 * 1024 * 1024

USAGE_COUNT = 10**12  # tokens: nothing that is larger can be true
USAGE_ITERATIONS = 100  # of one response; server-side loops end after some ten
ITERATED_MODELS = 8  # in these, mostly two; the price of each may have to be sought among thousands of patterns
SVG_AUTHORS = 8  # of one response that are told apart
USAGE_WORD_CHARACTERS = 32  # of a service tier and the like
PARTS_NANO_USD = 10**12  # that several models and searches together cost at most, whatever a client has sent
COST_NANO_USD = 10**15  # a million USD: no response costs more, and sums of such fit into SQLite's 64 bits
LEDGER_PAUSE_SECONDS = 1.0  # rows are written together: so much is lost by a crash, and other workers learn so late
LEDGER_LAST_SECONDS = 5.0  # at the end, for rows that are not yet written
LEDGER_LOCK_SECONDS = 1.0  # for a file that another process is writing or reading
LEDGER_BATCH_ROWS = 1000  # in a transaction; takes some 15 ms
LEDGER_BACKLOG_ROWS = 10_000  # more than that waiting for a file that can't be written is dropped, and counted
LEDGER_SWEPT_ROWS = 5000  # that are too old, in a transaction; takes some 5 ms
LEDGER_SUMS_DAYS = 400  # for which the sums are kept: a year, and the month to compare it with
LEDGER_JUMP_SECONDS = 60.0  # that the clock is ahead of what it was: it was set, or the machine has slept
LEDGER_BELIEVED_SECONDS = 86400.0  # for which it must stay ahead before the rows are deleted that are too old by it
LEDGER_SEARCHED_ROWS = 200_000  # for those that are wanted; takes some 0.1 s, for which nobody can write
LEDGER_GROUPS = 10_000  # in one answer
LEDGER_MODELS = 100  # of one user in an hour that its sums tell apart; nobody works with so many
SHELL_PATTERNS = 32 * 1024  # that are kept compiled; relay.json may name a model in each
CONFIG_BYTES = 64 * 1024 * 1024  # of each file of a configuration; LiteLLM's prices have 3.5 MB
PRICE_USD = 1.0  # the most that a token may cost
ECHO_BODY_BYTES = 1024 * 1024  # echo reads no more
ECHO_VALUES = 50_000  # in a request to echo, which take up to 5 MB
ECHO_FRACTIONS = 5000  # numbers with a fraction among them, which `json` writes in up to 5 ms
ECHO_AT_ONCE_BYTES = 16 * 1024  # it answers more in a thread


# ==== Errors =====================================================================================
#
# A fault gets its status, type and code where it is found; Exchange.error_response() alone makes HTTP of a RelayError.
#
# RelayError                what the client is told; carries status, type (`kind`) and short code
#  ├─ BadRequest            400  ├─ MalformedRequest: the connection is closed, too
#  │                             └─ Untranslatable (in Formats): the provider's format can't say it
#  │                                └─ NoThreads: nor keep a conversation
#  ├─ Unauthenticated       401  └─ TokenError (in Auth), one subclass a reason
#  ├─ Forbidden             403
#  ├─ NotFound              404
#  ├─ MethodNotAllowed      405
#  ├─ TooLarge              413
#  ├─ UnsupportedCoding     415
#  ├─ NoWebSocket           426
#  ├─ RateLimited           429  └─ BudgetExceeded
#  ├─ Unavailable           503
#  ├─ UpstreamFailed        502
#  └─ UpstreamSilent        504
# UpstreamFailure           what one attempt met; the relay may try elsewhere
#  ├─ Unreachable           nothing was sent
#  ├─ BrokenExchange        sent, and then no (whole) head of a response
#  └─ NoResponse              sent, and silent for the provider's timeout
# AnswerFault               (in Formats) a response that is translated holds an error, or no message
#  └─ UnfitAnswer             it is sound, and no message can hold it
# EchoFault                 (in Echo) the error that echo was asked for, or finds in a request
# FramingError              bytes that are not HTTP/1.1; whose fault it is, the caller knows
# EarlyResponse               no fault: a provider that answers while it is still being sent the request
# Overdue                   no fault either: a task's time is over, and it decides what that means
# ClientGone                nobody is left to be told anything
# ConfigError               everything that is wrong with relay.json
# UsageError                (in Command line) a command line that asks for what there isn't


class RelayError(Exception):
    """A fault of which the client is told: HTTP status, error type of both APIs, and a short code."""

    status = 500
    kind = "api_error"
    code = "internal_error"
    details: Mapping[str, str] = types.MappingProxyType({})  # by which Anthropic's SDKs act, beside the type
    lasts = False  # whether trying again can't help; that is also so for each 4xx but 408 and 429
    close = False  # whether the connection can't be used for another request

    def __init__(
        self, message: str, code: str = "", headers: Sequence[tuple[str, str]] = (), lasts: bool = False
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.code
        self.headers = list(headers)
        self.lasts = lasts or self.lasts or (self.status < 500 and self.status not in (408, 429))


class BadRequest(RelayError):
    """The body or a field of it can't be used."""

    status, kind, code = 400, "invalid_request_error", "bad_request"


class MalformedRequest(BadRequest):
    """The head or the framing breaks RFC 9112: what follows on the connection can't be trusted."""

    code = "malformed_request"
    close = True

    def __init__(self, message: str, status: int = 400) -> None:
        self.status = status
        super().__init__(message)


class Unauthenticated(RelayError):
    """No token, or none that is valid."""

    status, kind, code = 401, "authentication_error", "unauthenticated"


class Forbidden(RelayError):
    """The caller is known and may not do this."""

    status, kind, code = 403, "permission_error", "forbidden"


class NotFound(RelayError):
    """No such path, model or entry."""

    status, kind, code = 404, "not_found_error", "not_found"


class MethodNotAllowed(RelayError):
    """The path is known, the method isn't one of its own."""

    status, kind, code = 405, "invalid_request_error", "method_not_allowed"

    def __init__(self, method: str, path: str, allowed: Sequence[str]) -> None:
        super().__init__(f"{method} is not allowed for {path}; use {' or '.join(allowed)}")
        self.headers = [("allow", ", ".join(allowed))]


class NoWebSocket(RelayError):
    """The request asks for a WebSocket; after this response, Codex goes on over HTTP (RFC 9110 §15.5.22)."""

    status, kind, code = 426, "invalid_request_error", "no_websocket"

    def __init__(self) -> None:
        super().__init__("this relay speaks no WebSocket; use HTTP", headers=[("upgrade", "websocket")])


class UnsupportedCoding(RelayError):
    """The body is in an encoding that can't be read here."""

    status, kind, code = 415, "invalid_request_error", "unsupported_coding"


class TooLarge(RelayError):
    """The body is over a limit of relay.json."""

    status, kind, code = 413, "request_too_large", "request_too_large"


class RateLimited(RelayError):
    """The caller, or an address that logs in, is over its limit."""

    status, kind, code = 429, "rate_limit_error", "rate_limited"

    def __init__(self, message: str, wait_seconds: float) -> None:
        wait_seconds = min(wait_seconds, RETRY_AFTER_LIMIT_SECONDS)
        super().__init__(message, headers=[("retry-after", str(math.ceil(wait_seconds)))])


class BudgetExceeded(RateLimited):
    """A user has spent what it may; trying again helps only when the budget begins anew."""

    code = "budget_exceeded"
    lasts = True


class Unavailable(RelayError):
    """The relay itself can't serve this now."""

    status, kind, code = 503, "api_error", "unavailable"

    def __init__(self, message: str, code: str = "", lasts: bool = False) -> None:
        super().__init__(message, code, [] if lasts else [("retry-after", "1")], lasts)


class UpstreamFailed(RelayError):
    """No provider could be reached, the response was broken, or the relay's key was refused."""

    status, kind, code = 502, "api_error", "upstream_failed"


class UpstreamSilent(RelayError):
    """The provider sent nothing for its timeout."""

    status, kind, code = 504, "timeout_error", "upstream_timeout"


class UpstreamFailure(Exception):
    """One attempt came to nothing."""


class Unreachable(UpstreamFailure):
    """No connection: refused, unknown host, TLS, connect timeout. Nothing was sent."""


class BrokenExchange(UpstreamFailure):
    """The connection broke, or what came is no response, after the request or a part of it was sent."""


class NoResponse(UpstreamFailure):
    """The request was sent, and nothing came for the provider's timeout."""


class FramingError(Exception):
    """Bytes that break the framing of HTTP/1.1."""


class EarlyResponse(Exception):
    """The provider speaks before it has the whole request."""


class Overdue(Exception):
    """A wait has reached its deadline."""


class ClientGone(Exception):
    """The client closed its side, or took nothing for too long."""


class ConfigError(Exception):
    """Everything that is wrong with a configuration; `problems` holds one line each. `unread`: the path of the file
    that can't be read, if that is all."""

    def __init__(self, problems: Sequence[str], unread: str = "") -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)
        self.unread = unread


def error_body(
    format: str, kind: str, message: str, code: str, request_id: str, details: Optional[Mapping[str, str]] = None
) -> bytes:
    """An error as the JSON of the format."""
    document: JsonDict
    if format == "anthropic":
        document = {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}
        if details:
            document["error"]["details"] = dict(details)
    else:
        document = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return json.dumps(document).encode("ascii")


def error_event(format: str, kind: str, message: str, code: str, request_id: str) -> bytes:
    """An error as the last event of a stream."""
    return b"event: error\ndata: %b\n\n" % error_body(format, kind, message, code, request_id)


# ==== Config =====================================================================================
#
# relay.json becomes a Config in three steps: parse_json refuses what JSON leaves vague, expand fills
# in the environment, and the tables of settings below check every value at its place. Problems are
# collected, so that one run of `check` shows all of them. Aliases and routes are followed here, too, since
# one of the checks is whether each alias leads to a provider.


class Secret:
    """A value that never shows itself: it prints as ***, and reveal() is the one way to read it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)


class ProviderKey(NamedTuple):
    """A key of a provider; `label` stands for it in logs and errors."""

    secret: Secret
    label: str
    weight: float
    mark: str  # tells it from another one that has its label after a reload, and shows nothing of it


class Translation(NamedTuple):
    """How requests in the other format are translated for a provider."""

    max_tokens_field: str  # max_tokens or max_completion_tokens: what its models take; auto: by its host
    reasoning: str  # none or effort: whether it can be told how much to think
    reasoning_back: str  # none, or the name of the member in which it wants its thinking back
    system_turns: str  # keep, user or lead: where the system's words may stand that come later
    default_max_tokens: int  # for requests that say nothing, where the format demands it
    drop: tuple[str, ...]  # members that it refuses
    extra: str  # members that it gets besides, as JSON


class Provider(NamedTuple):
    """A provider as relay.json describes it, its base_url taken apart."""

    name: str
    format: str  # anthropic, openai or echo
    scheme: str
    host: str
    port: int
    authority: str  # host[:port] as it stands in URLs and Host
    prefix: str  # stands before the part of the path that follows /v1
    keys: Optional[tuple[ProviderKey, ...]]  # None: takes no key at all, like a local model server
    enabled: bool
    timeout: float
    connect_timeout: float
    cooldown: float
    key_strategy: str
    headers: tuple[tuple[str, Optional[str]], ...]
    auth_header: str
    models: tuple[str, ...]
    query: str  # of its base_url, which goes upstream with each request
    proxy: str  # its URL, or "direct"; where empty, the environment tells
    client_keys: bool  # whether clients bring their own credential for it
    translate: Optional[Translation]  # None: it gets requests in its own format only

    @property
    def usable(self) -> bool:
        """Whether requests can be sent: it is enabled, and has a key unless it takes none."""
        return self.enabled and self.keys != ()

    @property
    def chat_format(self) -> str:
        """The format in which it gets and answers chats; echo does it in Anthropic's."""
        return "anthropic" if self.format == "echo" else self.format

    @property
    def origin(self) -> str:
        """scheme://host[:port], as a URL of this provider begins."""
        return f"{self.scheme}://{self.authority}"

    def serves(self, model: str) -> bool:
        """Whether its `models` patterns, if it has any, admit the model."""
        return not self.models or matches_any(model, self.models)


class User(NamedTuple):
    """A user of relay.json."""

    name: str
    password: str  # a hash as hash_password makes it, or empty: can't log in
    models: Optional[tuple[str, ...]]  # None: all of them
    requests_per_minute: int  # 0: no limit
    tokens_since: float  # tokens issued before are refused; seconds since 1970
    keys: tuple[Secret, ...]  # each of which shows who calls, like a token
    enabled: bool
    usd_per_day: float  # 0: no budget, here and below
    usd_per_month: float
    tokens_per_day: int
    viewer: bool  # sees everything, and may call no model

    @property
    def has_budget(self) -> bool:
        """Whether what this user spends is limited."""
        return bool(self.usd_per_day or self.usd_per_month or self.tokens_per_day)


class ServerSettings(NamedTuple):
    """The `server` section."""

    host: str
    port: int
    access_keys: tuple[Secret, ...]
    jwt_secret: Optional[Secret]
    workers: int
    max_body_mb: float
    max_upload_mb: float
    max_held_mb: float
    max_connections: int
    drain_seconds: float
    cors_origins: tuple[str, ...]
    log: str
    dashboard: bool


class LedgerSettings(NamedTuple):
    """The `ledger` section."""

    path: str  # as written: relative to the folder of relay.json, until load_config() has read it
    keep_days: int


class Price(NamedTuple):
    """What the tokens of a model cost. A rate is a whole number of PRICE_UNIT, by (kind, tier, above): the kind as in
    Used; the service tier, empty for the standard one; for prompts of more than so many thousand tokens, 0 for any."""

    rates: Mapping[tuple[str, str, int], int]
    factors: Mapping[str, int]  # of a speed or a place of inference; also in PRICE_UNIT


class Prices(NamedTuple):
    """Prices of models: by their names, else by patterns of which the first match counts."""

    by_name: Mapping[str, Price]
    by_pattern: Sequence[tuple[str, Price]]
    as_of: str = ""  # the day of the file


class RunSecrets(NamedTuple):
    """Secrets made up for one run, used where relay.json has none."""

    access_key: Secret
    jwt_secret: Secret


class Config(NamedTuple):
    """A whole relay.json, checked."""

    server: ServerSettings
    users: Mapping[str, User]
    any_subject: bool  # there is no section `users`: tokens of any subject are taken
    user_keys: Mapping[bytes, str]  # whose key has this SHA-256
    providers: Mapping[str, Provider]
    aliases: Mapping[str, tuple[str, ...]]
    routes: Mapping[str, tuple[str, ...]]
    env_file: str = ""  # relative to the folder of relay.json
    run_secrets: Optional[RunSecrets] = None
    ledger: Optional[LedgerSettings] = None
    prices: Optional[Prices] = None
    prices_file: str = ""  # as written: relative to the folder of relay.json
    beside_seen: Sequence[tuple[int, ...]] = ()  # the states of env_file and prices_file before they were read
    wide_aliases: Sequence[str] = ()  # those with a *, each of which a name is compared with


DEFAULT_PORTS = {"http": 80, "https": 443, "echo": 0}
STRATEGIES = ("sticky", "round-robin", "random", "weighted", "fill-first")
VARIABLE = r"\$\{([A-Za-z_][A-Za-z0-9_]*|file:[^}]+?)(:-([^}]*))?\}"
TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 §5.6.2
SCRYPT_HASH = r"scrypt\$([0-9]{1,7})\$([0-9]{1,2})\$([0-9]{1,2})\$([A-Za-z0-9_-]{16,})\$([A-Za-z0-9_-]{22,})"
SCRYPT_MEMORY_BYTES = 64 * 1024 * 1024
SCRYPT_WORK = 2**20  # N * r * p: eight times what hash_password() takes, some 0.4 s
# Framing is between two neighbours; no configuration may change it.
FRAMING_HEADERS = frozenset(
    {"connection", "content-length", "transfer-encoding", "upgrade", "te", "trailer", "keep-alive"}
)


class JsonObject(dict[str, Any]):
    """A JSON object that remembers which of its keys were given more than once."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated: list[str] = []
        if len(self) < len(pairs):
            counts = collections.Counter(key for key, _ in pairs)
            self.repeated = [key for key, count in counts.items() if count > 1]


class FromEnvironment(str):
    """Text in which a variable was filled in: it may stand where a number is expected."""


class Problems:
    """The problems of a configuration, each with its place."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: list[str] = []

    def add(self, place: str, message: str) -> None:
        self.lines.append(f"{self.name}: {place}: {message}" if place else f"{self.name}: {message}")


def parse_json(text: Union[str, bytes]) -> Any:
    """The value of a JSON text, stricter than `json.loads`: NaN and infinities are refused too, and
    objects come as JsonObject. Raises ValueError with the place."""
    try:
        return json.loads(text, object_pairs_hook=JsonObject, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno} column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def refuse_constant(name: str) -> NoReturn:
    """Refuses NaN, Infinity and -Infinity, which are not JSON (RFC 8259 §6)."""
    raise ValueError(f"{name} is not JSON")


def suggestion(name: str, known: Iterable[str]) -> str:
    """ ", did you mean X?" when something known is close to `name`, else nothing."""
    close = close_matches(name, known, 1)
    return f", did you mean {close[0]}?" if close else ""


def listing(names: Sequence[str]) -> str:
    """The first LISTED_NAMES names, separated by commas, and … for more."""
    return ", ".join([*names[:LISTED_NAMES], *["…"] * (len(names) > LISTED_NAMES)])


def close_matches(name: str, known: Iterable[str], count: int) -> list[str]:
    """At most `count` of the known names, those closest to `name`, the best first. Long names have none, and of
    many only the first are compared: that takes time in proportion to the product of their lengths."""
    room, compared = COMPARED_PRODUCT // max(1, len(name)), []
    for other in known:
        if len(other) <= COMPARED_CHARACTERS:
            room -= len(other)
            if room < 0:
                break
            compared.append(other)
    return difflib.get_close_matches(name, compared, count) if len(name) <= COMPARED_CHARACTERS else []


WILDCARD = re.compile(r"[*?[]")


# Before Python 3.11, `fnmatch` itself remembers 256 only: of more, each is compiled anew each time, which takes 0.1 ms.
@functools.lru_cache(maxsize=SHELL_PATTERNS)
def shell_pattern(pattern: str) -> Optional[re.Pattern[str]]:
    """The regular expression of a shell pattern; None for one that only its own name matches."""
    try:
        return re.compile(fnmatch.translate(pattern)) if WILDCARD.search(pattern) else None
    except re.error:  # an empty range such as [z-a], before Python 3.10
        return None


def matches(name: str, pattern: str) -> bool:
    """Whether the name equals a shell pattern, whatever characters it has, or matches it, case-sensitively."""
    expression = shell_pattern(pattern)
    return name == pattern or (expression is not None and expression.match(name) is not None)


def patterns_of(config: "Config") -> Iterator[str]:
    """The shell patterns with which names are compared while a configuration is served."""
    served = [provider.models for provider in config.providers.values()]
    allowed = [user.models or () for user in config.users.values()]
    priced = [pattern for pattern, _ in config.prices.by_pattern] if config.prices else []
    return itertools.chain(config.routes, config.server.cors_origins, *served, *allowed, priced)


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether the name matches one of the shell patterns."""
    return any(matches(name, pattern) for pattern in patterns)


def expand(value: Any, place: str, environ: Mapping[str, str], problems: Problems) -> Any:
    """The value with ${NAME} and ${NAME:-default} filled in, comments left out, repeated keys reported."""
    if isinstance(value, JsonObject):
        for key in value.repeated:
            problems.add(join(place, key), "given more than once")
        return {
            key: expand(item, join(place, key), environ, problems)
            for key, item in value.items()
            if not key.startswith("//")
        }
    if isinstance(value, list):
        return [expand(item, f"{place}[{index}]", environ, problems) for index, item in enumerate(value)]
    if isinstance(value, str) and "${" in value:
        return expand_text(value, place, environ, problems)
    return value


def expand_text(text: str, place: str, environ: Mapping[str, str], problems: Problems) -> str:
    """One string with its variables filled in."""

    def fill(match: re.Match[str]) -> str:
        name, has_default, default = match.groups()
        if has_default or name in environ:
            return environ.get(name) or default or ""
        if name.startswith("file:"):
            problems.add(place, f"the file {name[len('file:') :]} can't be read as a regular file of UTF-8")
        else:
            problems.add(place, f"the environment variable {name} is not set; set it, or write ${{{name}:-}}")
        return ""

    if "${" in re.sub(VARIABLE, "", text):
        problems.add(place, "a ${ that is no variable; write ${NAME}, ${NAME:-default} or ${file:PATH}")
    return FromEnvironment(re.sub(VARIABLE, fill, text))


def join(place: str, key: str) -> str:
    """The place of a key in the section at `place`."""
    return f"{place}.{key}" if place else key


# A check takes a value as it stands in relay.json and returns what the program works with, or raises
# ValueError saying what it must be.
Check = Callable[[Any], Any]


def expect(value: Any, kinds: Union[type, tuple[type, ...]], wanted: str) -> Any:
    """The value, if it is of these types. Raises ValueError that says what is wanted instead."""
    if not isinstance(value, kinds):
        raise ValueError(f"must be {wanted}, not {kind_of(value)}")
    return value


def as_text(value: Any) -> str:
    """The string."""
    return str(expect(value, str, "a string"))


def as_some_text(value: Any) -> str:
    """The string, which isn't empty."""
    if not as_text(value):
        raise ValueError("must not be empty")
    return str(value)


def as_host(value: Any) -> str:
    """The address or name of a host, as far as it can be one."""
    found = as_some_text(value)
    if re.search(r"[][/*@\s]", found) or found.count(":") == 1:
        raise ValueError("must be an address or the name of a host alone, such as 127.0.0.1, ::1 or 0.0.0.0")
    try:
        found.encode("idna")
    except UnicodeError:
        raise ValueError("must be an address or the name of a host") from None
    return found


def as_boolean(value: Any) -> bool:
    """The truth value, which may come as text from the environment."""
    if isinstance(value, FromEnvironment) and value in ("true", "false"):
        return value == "true"
    return bool(expect(value, bool, "true or false"))


def as_number(value: Any) -> float:
    """The number, which may come as text from the environment."""
    if isinstance(value, FromEnvironment) and re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"must be a number, not {kind_of(value)}")
    if not -1e15 < value < 1e15:  # nor NaN, infinities and integers that no float can hold
        raise ValueError("must be a number of a sensible size")
    return value


def as_positive(value: Any) -> float:
    """The number as a float, more than 0."""
    # The upper bound keeps every deadline within what a clock and a socket option can hold.
    if not 0 < as_number(value) <= 10_000_000:
        raise ValueError("must be more than 0 and at most 10000000")
    return float(value)


def as_whole(low: int, high: int) -> Check:
    """A check for whole numbers from `low` to `high`."""

    def check(value: Any) -> int:
        found = as_number(value)
        if found != int(found) or not low <= found <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(found)

    return check


def as_one_of(*choices: str) -> Check:
    """A check for one of a few words."""

    def check(value: Any) -> str:
        if as_text(value) not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}{suggestion(value, choices)}")
        return str(value)

    return check


def as_texts(value: Any) -> tuple[str, ...]:
    """The strings of a list, none of them empty."""
    if isinstance(value, str) and value:
        raise ValueError(f"must be a list: write [{json.dumps(str(value))}]")
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise ValueError("must be a list of strings that aren't empty")
    return tuple(str(item) for item in value)


def as_text_or_texts(value: Any) -> tuple[str, ...]:
    """The strings of a list, or the one that stands for it."""
    expect(value, (str, list), "a string or a list of strings")
    found = as_texts([value] if isinstance(value, str) else value)
    if not found:
        raise ValueError("must name at least one")
    return found


def as_access_keys(value: Any) -> tuple[Secret, ...]:
    """The keys that aren't empty, of one or of a list."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError("must be a string or a list of strings")
    keys = tuple(Secret(secret) for secret in map(header_secret, items) if secret)
    if any(len(key.reveal()) > JWT_BYTES for key in keys):
        raise ValueError(f"must have at most {JWT_BYTES} characters")
    return keys


def stripped_secret(value: str) -> str:
    """A secret without the white space that files and shells leave around it. Raises ValueError for one in quotes,
    which a `docker --env-file` keeps."""
    found = str(value.strip())
    if len(found) > 1 and found[0] == found[-1] and found[0] in "\"'":
        raise ValueError("stands in quotes that are part of it: take them off")
    return found


def header_secret(value: str) -> str:
    """A stripped secret that a header can hold. Raises ValueError."""
    found = stripped_secret(value)
    if not re.fullmatch(r"[\x20-\x7e]*", found):
        raise ValueError("must be printable ASCII")
    return found


def as_user_keys(value: Any) -> tuple[Secret, ...]:
    """The keys of a user that aren't empty, of one or of a list, long enough not to be guessed."""
    keys = as_access_keys(value)
    if any(len(key.reveal()) < KEY_CHARACTERS for key in keys):
        raise ValueError(f"must have at least {KEY_CHARACTERS} characters each")
    return keys


def as_jwt_secret(value: Any) -> Optional[Secret]:
    """The secret, long enough to be one; None when it is empty."""
    found = stripped_secret(as_text(value))
    try:
        size = len(found.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        raise ValueError("must not hold half a surrogate pair") from None
    if found and size < JWT_SECRET_BYTES:
        raise ValueError(f"must have at least {JWT_SECRET_BYTES} bytes (RFC 7518 §3.2), or be empty")
    return Secret(found) if found else None


def as_password_hash(value: Any) -> str:
    """The scrypt hash of a password, or nothing."""
    found = as_text(value)
    if not found:
        return ""
    match = re.fullmatch(SCRYPT_HASH, found)
    if not match:
        raise ValueError("must be a hash as `monorelay.py hash-password` prints it")
    cost, block, parallel = int(match[1]), int(match[2]), int(match[3])
    # RFC 7914 §2 and §6; what goes beyond the limits could never be computed, or would keep others waiting.
    possible = cost > 1 and cost & (cost - 1) == 0 and block and parallel and cost < 2 ** (16 * block)
    memory = 128 * block * (cost + parallel + 2)
    if not possible or memory > SCRYPT_MEMORY_BYTES or cost * block * parallel > SCRYPT_WORK:
        raise ValueError("is a hash that this relay doesn't compute; make one with `monorelay.py hash-password`")
    return found


def as_moment(value: Any) -> float:
    """The seconds since 1970 of a time in ISO 8601 that names its zone."""
    try:
        # Python before 3.11 knows no Z.
        found = datetime.datetime.fromisoformat(re.sub("[zZ]$", "+00:00", as_text(value)))
    except ValueError:
        found = datetime.datetime.min
    if not found.tzinfo:
        raise ValueError("must be a time such as 2026-01-31T12:00:00Z")
    return found.timestamp()


def as_base_url(value: Any) -> str:
    """The URL of a provider."""
    found = as_text(value)
    try:
        parts = urlsplit(found)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or not re.fullmatch(r"[\x21-\x7e]+", found):
        raise ValueError("must be a URL such as https://api.example.com")
    if parts.fragment or "@" in parts.netloc:
        raise ValueError("must have no user and no fragment; keys belong in `keys`")
    endpoint = re.search(r"/(?:messages|chat/completions|completions|responses|embeddings|models)/?\Z", parts.path)
    if endpoint:
        raise ValueError(f"must not end in {endpoint[0]}, which is added to it: cut that off")
    return found


def as_proxy_url(value: Any) -> str:
    """The URL of an HTTP proxy, or the word for none."""
    found = as_text(value)
    try:
        valid = found == "direct" or (urlsplit(found).scheme == "http" and bool(urlsplit(found).hostname))
    except ValueError:
        valid = False
    if not valid:
        raise ValueError('must be "direct", or a URL such as http://proxy.example:3128')
    return found


def as_headers(value: Any) -> tuple[tuple[str, Optional[str]], ...]:
    """The headers to set upstream, None for those to remove."""
    for name, content in expect(value, dict, "an object of headers").items():
        if not TOKEN.fullmatch(name) or name.lower() in FRAMING_HEADERS:
            raise ValueError(f"{name!r} is not a header that can be set")
        fits = isinstance(content, str) and re.fullmatch(r"[\t -~]*", content)  # RFC 9110 §5.5, without obs-text
        if content is not None and not fits:
            raise ValueError(f"{name}: must be a string without control characters, or null to remove the header")
    return tuple((name, None if content is None else str(content)) for name, content in value.items())


def as_list_or_client(value: Any) -> Any:
    """The list, or the word that stands for the clients' own credentials."""
    return value if value == "client" else expect(value, list, "a list")


def as_object_or_boolean(value: Any) -> Any:
    """The object of settings, or whether there may be some."""
    return expect(value, (bool, dict), "true, false or an object of settings")


def as_json_object(value: Any) -> str:
    """The object as JSON."""
    return json.dumps(expect(value, dict, "an object"), allow_nan=False)


def provider_key(value: Any, number_in_list: int) -> Optional[ProviderKey]:
    """The key that an entry of `keys` stands for; None when it is empty. Raises ValueError."""
    entry = {"key": value} if isinstance(value, str) else value
    if not isinstance(entry, dict) or not isinstance(entry.get("key"), str):
        raise ValueError('must be a string, or an object with "key"')
    unknown = [name for name in entry if name not in ("key", "label", "weight")]
    if unknown:
        raise ValueError(f"{unknown[0]}: unknown key{suggestion(unknown[0], ('key', 'label', 'weight'))}")
    secret = header_secret(entry["key"])
    if " " in secret:
        raise ValueError("must be printable ASCII without spaces")
    label = as_some_text(entry.get("label", f"key{number_in_list}"))
    mark = hashlib.sha256(secret.encode("ascii")).hexdigest()[:16]
    return ProviderKey(Secret(secret), label, as_positive(entry.get("weight", 1)), mark) if secret else None


def kind_of(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a string" if isinstance(value, str) else "a number")


Settings = Mapping[str, tuple[Check, Any]]  # name: (check, default); sizes are in MB, times in seconds

SERVER_SETTINGS: Settings = {
    "host": (as_host, "127.0.0.1"),
    "port": (as_whole(0, 65535), 8787),
    "access_key": (as_access_keys, ()),
    "jwt_secret": (as_jwt_secret, None),
    "workers": (as_whole(1, 64), 1),
    "max_body_mb": (as_positive, 32.0),  # Anthropic's limit for messages
    "max_upload_mb": (as_positive, 512.0),  # Anthropic's limit for files is 500
    "max_held_mb": (as_positive, 1024.0),  # all bodies together that are held to be sent again if need be
    "max_connections": (as_whole(1, 1_000_000), 4096),
    "drain_seconds": (as_positive, 30.0),
    "cors_origins": (as_texts, ()),
    "log": (as_one_of("text", "json", "off"), "text"),
    "dashboard": (as_boolean, True),
}
USER_SETTINGS: Settings = {
    "password": (as_password_hash, ""),
    "models": (as_texts, None),
    "requests_per_minute": (as_whole(1, 1_000_000), 0),
    "tokens_since": (as_moment, 0.0),
    "key": (as_user_keys, ()),
    "enabled": (as_boolean, True),
    "usd_per_day": (as_positive, 0.0),
    "usd_per_month": (as_positive, 0.0),
    "tokens_per_day": (as_whole(1, 10**15 - 1), 0),
    "viewer": (as_boolean, False),
}
LEDGER_SETTINGS: Settings = {"path": (as_some_text, "usage.db"), "keep_days": (as_whole(1, 36500), 90)}
PROVIDER_SETTINGS: Settings = {
    "format": (as_one_of("anthropic", "openai", "echo"), ""),
    "base_url": (as_base_url, ""),
    "keys": (as_list_or_client, None),  # read_keys looks into each
    "enabled": (as_boolean, True),
    "timeout": (as_positive, 900.0),  # longer than the SDKs' own 600: the client decides first
    "connect_timeout": (as_positive, 10.0),
    "cooldown": (as_positive, 30.0),
    "key_strategy": (as_one_of(*STRATEGIES), "sticky"),
    "headers": (as_headers, ()),
    "auth_header": (as_one_of("x-api-key", "authorization", "api-key"), ""),
    "models": (as_texts, ()),
    "proxy": (as_proxy_url, ""),
    "translate": (as_object_or_boolean, True),  # read_translation looks into it
}
TRANSLATION_SETTINGS: Settings = {
    "max_tokens_field": (as_one_of("auto", "max_tokens", "max_completion_tokens"), "auto"),
    "reasoning": (as_one_of("none", "effort"), "none"),
    "reasoning_back": (as_one_of("none", "reasoning_content", "reasoning"), ""),
    "system_turns": (as_one_of("keep", "user", "lead"), ""),
    "default_max_tokens": (as_whole(1, 10_000_000), 8192),
    "drop": (as_texts, ()),
    "extra": (as_json_object, "{}"),
}
SECTIONS = ("server", "users", "providers", "aliases", "routes")
TOP_LEVEL = (*SECTIONS, "env_file", "ledger", "prices")
# What a relay serves when there is no relay.json at all: the same as the shipped file, but for the ledger. Nobody has
# asked for a file, and there is no folder to be named.
BUILT_IN_CONFIG = """{
  "server": {"host": "127.0.0.1", "port": 8787,
    "access_key": "${MONORELAY_ACCESS_KEY:-}", "jwt_secret": "${MONORELAY_JWT_SECRET:-}"},
  "providers": {
    "anthropic": {"format": "anthropic", "base_url": "https://api.anthropic.com", "keys": ["${ANTHROPIC_API_KEY:-}"]},
    "openai": {"format": "openai", "base_url": "https://api.openai.com/v1", "keys": ["${OPENAI_API_KEY:-}"]},
    "echo": {"format": "echo"}
  },
  "routes": {"claude-*": ["anthropic", "echo"], "gpt-*": ["openai", "echo"], "echo*": "echo"}
}
"""


def parse_config(source: str, environ: Mapping[str, str], name: str = "relay.json") -> Config:
    """The configuration that a relay.json text describes. Raises ConfigError with all problems at once."""
    problems = Problems(name)
    document = expand(parse_object(source, name), "", environ, problems)
    for key in document:
        if key not in TOP_LEVEL:
            problems.add(key, f"unknown key{suggestion(key, TOP_LEVEL)}")
    if not isinstance(document.get("env_file", ""), str):
        problems.add("env_file", "must be the path of a file")
    sections = {key: read_object(document.get(key, {}), key, problems) for key in SECTIONS}
    for key in SECTIONS:
        if "" in sections[key]:
            problems.add(key, "a name in it is empty")
    server = read_settings(SERVER_SETTINGS, sections["server"], "server", problems)
    server["access_keys"] = server.pop("access_key")
    users = {user: read_user(user, given, problems) for user, given in sections["users"].items()}
    aliases = read_lists(sections["aliases"], "aliases", problems)
    config = Config(
        ServerSettings(**server),
        users,
        "users" not in document,
        read_user_keys(users, problems),
        {provider: read_provider(provider, given, problems) for provider, given in sections["providers"].items()},
        aliases,
        read_lists(sections["routes"], "routes", problems),
        str(document.get("env_file", "")),
        ledger=read_ledger_settings(document, users, problems),
        wide_aliases=[alias for alias in aliases if "*" in alias],
    )
    config = read_prices(config, document.get("prices"), problems)
    shared = shared_key(config.server.access_keys, config.user_keys)
    if shared:
        problems.add("server.access_key", shared)
    check_routes(config, problems)
    check_aliases(config, problems)
    if problems.lines:
        raise ConfigError(problems.lines)
    return config


def parse_object(source: str, name: str) -> JsonObject:
    """The JSON object that the text of a configuration is. Raises ConfigError."""
    try:
        document = parse_json(source)
    except ValueError as error:
        raise ConfigError([f"{name}: {error}{json_hint(source)}"]) from None
    if not isinstance(document, JsonObject):
        raise ConfigError([f"{name}: must be a JSON object, not {kind_of(document)}"])
    return document


def json_hint(source: str) -> str:
    """The usual reason why a text is no JSON, in parentheses; empty for others."""
    bare = re.sub(r'"(?:[^"\\\n]|\\.)*"?', '""', source)  # what stands in strings says nothing
    if not source.strip():
        return " (the file is empty)"
    if re.search(r"['\u2018-\u201d]\s*:", bare):
        return ' (names and texts stand in double quotes: ")'
    if re.search(r"^[ \t]*(?://|#)|//|/\*", bare, re.MULTILINE):
        return ' (JSON has no comments: use a key that begins with "//")'
    if re.search(r",\s*[\]}]", bare):
        return " (there is a comma behind the last entry of a list or an object)"
    return ""


def read_object(value: Any, place: str, problems: Problems) -> JsonDict:
    """The value, if it is an object; else a problem and an empty one."""
    if isinstance(value, dict):
        return value
    problems.add(place, f"must be an object, not {kind_of(value)}")
    return {}


def read_settings(table: Settings, given: Any, place: str, problems: Problems) -> JsonDict:
    """The settings of a table as given or by default."""
    section = read_object(given, place, problems)
    for key in section:
        if key not in table:
            problems.add(f"{place}.{key}", f"unknown key{suggested_setting(key, table)}")
    found = {}
    for key, (check, default) in table.items():
        found[key] = default
        if key in section:
            try:
                found[key] = check(section[key])
            except ValueError as error:
                problems.add(f"{place}.{key}", str(error))
    return found


# What other programs call a setting of a provider.
OTHER_NAMES = {
    "api_key": "keys", "api_keys": "keys", "apikey": "keys", "key": "keys", "token": "keys",
    "api_base": "base_url", "api_url": "base_url", "url": "base_url", "endpoint": "base_url", "type": "format",
}  # fmt: skip


def suggested_setting(name: str, table: Collection[str]) -> str:
    """Which setting an unknown one was probably meant to be, or else all that there are."""
    other = OTHER_NAMES.get(name.lower().replace("-", "_"), "")
    meant = f", did you mean {other}?" if other in table else suggestion(name, table)
    return meant or f"; there are {', '.join(sorted(table))}"


def read_user(name: str, given: Any, problems: Problems) -> User:
    """One user."""
    settings = read_settings(USER_SETTINGS, given, f"users.{name}", problems)
    settings["keys"] = settings.pop("key")
    # Rows, and so what is spent of budgets, are kept by the name, cut to this length.
    if len(name) > LOG_VALUE_CHARACTERS:
        problems.add(f"users.{name[:32]}...", f"a name has at most {LOG_VALUE_CHARACTERS} characters")
    return User(name, **settings)


def read_user_keys(users: Mapping[str, User], problems: Problems) -> dict[bytes, str]:
    """Whose each user's key is, by its SHA-256."""
    found: dict[bytes, str] = {}
    for user in users.values():
        for key in user.keys:
            owner = found.setdefault(fingerprint(key.reveal()), user.name)
            if owner != user.name:
                problems.add(f"users.{user.name}.key", f"is the key of {owner}, too")
    return found


def fingerprint(key: str) -> bytes:
    """By which a user's key is found, in a time that tells nothing of the others."""
    return hashlib.sha256(key.encode("latin-1")).digest()


def shared_key(access_keys: Sequence[Secret], user_keys: Mapping[bytes, str]) -> str:
    """What is wrong with access keys of which one is a user's, too, who would have no limits; nothing if none is."""
    owner = next(filter(None, (user_keys.get(fingerprint(key.reveal())) for key in access_keys)), "")
    return f"is the key of {owner}, too, whom nothing would limit" if owner else ""


def read_lists(section: JsonDict, place: str, problems: Problems) -> dict[str, tuple[str, ...]]:
    """A section whose values are a name or a list of names."""
    return read_settings({key: (as_text_or_texts, ()) for key in section}, section, place, problems)


def read_ledger_settings(document: JsonDict, users: Mapping[str, User], problems: Problems) -> Optional[LedgerSettings]:
    """The ledger's settings, if there is one; without it there can't be budgets, which a restart would forget."""
    if "ledger" in document:
        return LedgerSettings(**read_settings(LEDGER_SETTINGS, document["ledger"], "ledger", problems))
    needed = 'has a budget, which needs the ledger: add "ledger": {"path": "usage.db"}'
    for user in users.values():
        if user.has_budget:
            problems.add(f"users.{user.name}", needed)
    return None


def read_prices(config: Config, value: Any, problems: Problems) -> Config:
    """The configuration with the prices that stand in it, or with the name of the file that has them."""
    if isinstance(value, str) and value:
        return config._replace(prices_file=str(value))
    if value is None:
        return config
    try:
        return config._replace(prices=parse_prices(value))
    except ValueError as error:
        problems.add("prices", str(error))
    return config


def read_provider(name: str, given: Any, problems: Problems) -> Provider:
    """One provider, its base_url taken apart and its keys read."""
    place = f"providers.{name}"
    before = len(problems.lines)
    settings = read_settings(PROVIDER_SETTINGS, given, place, problems)
    settings["client_keys"] = settings["keys"] == "client"
    settings["keys"] = None if settings["client_keys"] else read_keys(settings["keys"], f"{place}.keys", problems)
    kind, url = settings["format"], settings.pop("base_url")
    parts = urlsplit(url or "echo://echo")
    settings["translate"] = read_translation(settings["translate"], kind, parts.hostname or "", place, problems)
    if len(problems.lines) == before:
        if not kind:
            problems.add(f"{place}.format", "is missing; it is anthropic, openai or echo")
        elif not url and kind != "echo":
            problems.add(f"{place}.base_url", "is missing")
    settings["auth_header"] = settings["auth_header"] or ("x-api-key" if kind == "anthropic" else "authorization")
    host, port = parts.hostname or "", parts.port or DEFAULT_PORTS[parts.scheme]
    authority = f"[{host}]" if ":" in host else host
    prefix = parts.path.rstrip("/")
    # Anthropic's SDK adds /v1 itself, OpenAI's expects it in base_url: what follows /v1 is common.
    if kind == "anthropic" and not prefix.endswith("/v1"):
        prefix += "/v1"
    return Provider(
        name=name,
        scheme=parts.scheme,
        host=host,
        port=port,
        authority=authority if port == DEFAULT_PORTS[parts.scheme] else f"{authority}:{port}",
        prefix="/v1" if kind == "echo" else prefix,
        query=parts.query,
        **settings,
    )


def read_keys(value: Any, place: str, problems: Problems) -> Optional[tuple[ProviderKey, ...]]:
    """The keys of a provider that aren't empty; None when it has no `keys` at all."""
    if value is None:
        return None
    keys = []
    for index, entry in enumerate(value):
        try:
            keys.append(provider_key(entry, index + 1))
        except ValueError as error:
            problems.add(f"{place}[{index}]", str(error))
    found = tuple(key for key in keys if key)
    for label, count in collections.Counter(key.label for key in found).items():
        if count > 1:
            problems.add(place, f"two keys are labelled {label}")
    return found


# Who refuses a turn with calls of tools that lacks its thinking: "The `reasoning_content` in the thinking mode must be
# passed back to the API."
THINKING_HOSTS = frozenset({"api.deepseek.com", "api.moonshot.ai", "api.moonshot.cn", "api.z.ai", "open.bigmodel.cn"})


def read_translation(value: Any, format: str, host: str, place: str, problems: Problems) -> Optional[Translation]:
    """How a provider is translated for; None where it isn't."""
    if value is False:
        return None
    given = value if isinstance(value, dict) else {}
    settings = read_settings(TRANSLATION_SETTINGS, given, f"{place}.translate", problems)
    # Most servers of OpenAI's format take the system's words anywhere; of Claude's models only some do.
    settings["system_turns"] = settings["system_turns"] or ("keep" if format == "openai" else "lead")
    usual = "reasoning_content" if host in THINKING_HOSTS else "none"
    settings["reasoning_back"] = settings["reasoning_back"] or usual
    return Translation(**settings)


# -- prices
#
# USD are computed in whole numbers: a price is so many 10^-30 USD a token, in which every number of a price list that
# has up to 17 digits, and is no less than 10^-13, has an exact place.

PRICE_UNIT = 10**30
KINDS = ("input", "cache_read", "cache_write", "cache_write_long", "output")
# Fields of LiteLLM's list, such as cache_creation_input_token_cost_above_1hr_above_200k_tokens_batches.
LITELLM_RATE = re.compile(
    r"(input_cost_per(?:_audio)?_token|output_cost_per(?:_image|_reasoning|_audio)?_token"
    r"|cache_read_input_token_cost|cache_creation_input_token_cost)"
    r"(_above_(?:1|12)hr)?(?:_above_([0-9]{1,6})k_tokens)?(?:_([a-z]+))?"
)
LITELLM_KINDS = {
    "input_cost_per_token": "input",
    "output_cost_per_token": "output",
    "output_cost_per_image_token": "pictures",
    "output_cost_per_reasoning_token": "thinking",
    "input_cost_per_audio_token": "heard",
    "output_cost_per_audio_token": "spoken",
    "cache_read_input_token_cost": "cache_read",
    "cache_creation_input_token_cost": "cache_write",
}


def parse_prices(document: Any) -> Prices:
    """The prices in a document of LiteLLM's form, USD per token by the model's name, or of relay.json's own, USD per
    million by pattern. Raises ValueError with the place."""
    expect(document, dict, "an object of models and their prices")
    models = {name: given for name, given in document.items() if not name.startswith("//")}
    for name, given in models.items():
        if not isinstance(given, dict):
            raise ValueError(f"{name}: must be an object of prices, not {kind_of(given)}")
    if any("litellm_provider" in given or "input_cost_per_token" in given for given in models.values()):
        models.pop("sample_spec", None)
        listed = {name: litellm_price(name, given) for name, given in models.items()}
        # What is priced by the second or by the picture has no price here.
        priced = {name: price for name, price in listed.items() if ("input", "", 0) in price.rates}
        for name, given in models.items():  # moonshot/kimi-latest has nothing but the name of another model
            meant = given.get("alias_of")
            if isinstance(meant, str) and meant in priced:
                priced.setdefault(name, priced[meant])
        patterns = tuple((name, priced.pop(name)) for name in [*priced] if WILDCARD.search(name))
        return Prices(priced, patterns)
    return Prices({}, tuple((pattern, pattern_price(pattern, given)) for pattern, given in models.items()))


def litellm_price(name: str, given: JsonDict) -> Price:
    """One entry of LiteLLM's list; fields that say nothing of tokens of text are ignored. Raises ValueError."""
    rates = litellm_rates(name, given)
    for above, level in litellm_levels(given.get("tiered_pricing")):
        for (kind, tier, _), rate in litellm_rates(f"{name}.tiered_pricing", level).items():
            rates[kind, tier, above] = rate
    pictures = {("output", tier, above): rate for (kind, tier, above), rate in rates.items() if kind == "pictures"}
    draws = given.get("mode") == "image_generation" or "-image" in name  # Databricks' do that in chats
    if pictures and (draws or ("output", "", 0) not in rates):
        # What such a model writes beside its pictures, if anything, is little.
        rates = {**{key: rate for key, rate in rates.items() if key[0] != "output"}, **pictures}
    factors = given.get("provider_specific_entry")
    factors = factors if isinstance(factors, dict) else {}
    numbers = {word: factor for word, factor in factors.items() if type(factor) in (int, float) and 0 < factor < 1000}
    return Price(rates, {word: exact(factor) for word, factor in numbers.items()})


def litellm_rates(place: str, given: JsonDict) -> dict[tuple[str, str, int], int]:
    """The rates that the fields of an entry give. Raises ValueError."""
    rates = {}
    for field, value in given.items():
        rate = litellm_rate(field)
        if rate and value is not None:
            rates[rate] = price_number(value, f"{place}.{field}")
    return rates


def litellm_levels(listed: Any) -> list[tuple[int, JsonDict]]:
    """The prices of Alibaba's models, each with the size of the prompt, in thousands, beyond which it holds; none where
    one doesn't tell that."""
    levels = []
    for level in listed if isinstance(listed, list) else []:
        sizes = level.get("range") if isinstance(level, dict) else None
        if not isinstance(sizes, list) or not sizes or type(sizes[0]) not in (int, float) or not 0 <= sizes[0] < 1e9:
            return []
        levels.append((int(sizes[0] // 1000), level))
    return levels


# The list has 300 names, and each some thousand times: without the memory, it takes twice as long.
@functools.lru_cache(maxsize=1024)
def litellm_rate(field: str) -> Optional[tuple[str, str, int]]:
    """Which rate a field of LiteLLM's list gives, if it does."""
    match = LITELLM_RATE.fullmatch(field)
    if not match:
        return None
    kind, lifetime, above, tier = match.groups()
    if lifetime and kind != "cache_creation_input_token_cost":
        return None
    return ("cache_write_long" if lifetime else LITELLM_KINDS[kind]), tier or "", int(above or 0)


def pattern_price(pattern: str, given: JsonDict) -> Price:
    """An entry of relay.json's own form. Raises ValueError."""
    for kind in given:
        if kind not in KINDS and not kind.startswith("//"):
            raise ValueError(f"{pattern}.{kind}: unknown key{suggestion(kind, KINDS)}")
    for kind in ("input", "output"):
        if kind not in given:
            raise ValueError(f"{pattern}.{kind}: is missing; it is USD per million tokens")
    rates = {kind: price_number(given[kind], f"{pattern}.{kind}", 1_000_000) for kind in KINDS if kind in given}
    return Price({(kind, "", 0): rate for kind, rate in rates.items()}, {})


def price_number(value: Any, place: str, tokens: int = 1) -> int:
    """The rate, in PRICE_UNIT a token, of so many USD for so many tokens. Raises ValueError."""
    try:
        found = as_number(value)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    if not 0 <= found <= PRICE_USD * tokens:
        raise ValueError(f"{place}: must be from 0 to {PRICE_USD * tokens:,.0f} USD")
    return exact(found) // tokens


@functools.lru_cache(maxsize=4096)  # the list has some 1,100 different numbers, of which each stands often
def exact(value: float) -> int:
    """The number in PRICE_UNIT, as it is written and not as the nearest binary fraction."""
    return int(decimal.Decimal(repr(value)) * PRICE_UNIT)


# -- where names lead, and where to listen


def check_routes(config: Config, problems: Problems) -> None:
    """Adds a problem for each provider that a route names and that doesn't exist."""
    for pattern, names in config.routes.items():
        for name in names:
            if name not in config.providers:
                problems.add(f"routes.{pattern}", f"there is no provider {name}{suggestion(name, config.providers)}")


LONG_CONTEXT = "[1m]"  # behind a model's name: with a context of a million tokens


class Target(NamedTuple):
    """A provider, and the name of the model as it is sent there."""

    provider: Provider
    model: str


def split_provider(config: Config, name: str) -> tuple[str, str]:
    """Model and provider of a `model@provider`; the name and nothing of any other."""
    model, _, provider = name.rpartition("@")
    return (model, provider) if model and provider in config.providers else (name, "")


def follow(config: Config, name: str, passed: tuple[str, ...]) -> list[Target]:
    """The targets of a name reached through the aliases `passed`. Raises ValueError for a cycle."""
    model, provider = split_provider(config, name)
    if provider:
        return [Target(config.providers[provider], model)]
    if name in passed:
        raise ValueError(f"the aliases {' -> '.join([*passed, name])} go round in a circle")
    alias, names = find_alias(config, name, passed)
    if alias:
        return [target for other in names for target in follow(config, other, (*passed, alias))]
    for pattern, providers in config.routes.items():
        if matches(name, pattern):
            known = [config.providers[provider] for provider in providers if provider in config.providers]
            return without_stand_in([Target(provider, name) for provider in known])
    return []


def find_alias(config: Config, name: str, passed: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The alias that a name is, or the first one with a `*` that matches it and wasn't passed; and the names that it
    stands for, with the `*` filled in. Nothing if there is none."""
    if name in config.aliases:
        return name, config.aliases[name]
    for alias in config.wide_aliases:
        before, _, behind = alias.partition("*")
        fits = name.startswith(before) and name.endswith(behind) and len(name) >= len(alias) - 1
        if fits and alias not in passed:
            filled = name[len(before) : len(name) - len(behind)]
            return alias, [other.replace("*", filled) for other in config.aliases[alias]]
    return "", ()


def without_stand_in(targets: list[Target]) -> list[Target]:
    """The targets of a route without echo, when another one is usable: echo shows a newcomer without any
    key that all works, and must never answer for a provider that has failed."""
    real = [target for target in targets if target.provider.format != "echo"]
    return real if any(target.provider.usable for target in real) else targets


def check_aliases(config: Config, problems: Problems) -> None:
    """Adds a problem for each alias that leads to no provider, or back to itself."""
    for alias, names in config.aliases.items():
        place = f"aliases.{alias}"
        if alias.count("*") > 1:
            problems.add(place, "must have one * at most")
        try:
            for name in names:
                follow(config, name, (alias,))
        except ValueError as error:
            problems.add(place, str(error))
            continue
        # Where a name with a * in it leads to, requests will tell.
        for name in [name for name in names if "*" not in alias and not leads_on(config, name, alias)]:
            provider, _, model = name.partition("/")
            other = f", did you mean {model}@{provider}?" if model and provider in config.providers else ""
            meant = other or suggestion(name, [*config.aliases, *config.routes])
            problems.add(place, f"{name} is neither an alias, nor matches a route, nor names a provider{meant}")


def leads_on(config: Config, name: str, alias: str) -> bool:
    """Whether a name that an alias stands for is another alias, names a provider, or matches a route."""
    named = split_provider(config, name)[1] or find_alias(config, name, (alias,))[0]
    return bool(named) or matches_any(name, config.routes)


def start_obstacle(config: Config) -> str:
    """Why the relay must not start with this configuration, or nothing: what listens beyond this
    machine needs a credential that can't be guessed."""
    if is_loopback(config.server.host):
        return ""
    keys = config.server.access_keys
    strong = all(len(key.reveal()) >= KEY_CHARACTERS for key in keys)
    if strong and (keys or config.server.jwt_secret or config.user_keys):
        return ""
    return (
        f"server.host: {config.server.host} is open to others: set server.access_key "
        f"({KEY_CHARACTERS} characters or more) or server.jwt_secret, or use 127.0.0.1"
    )


def is_loopback(host: str) -> bool:
    """Whether the host can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


# ==== Auth =======================================================================================
#
# A caller shows a token in `Authorization: Bearer` or `x-api-key`, or different ones in both, of which one that is
# valid suffices; where there is an `x-monorelay-key`, it alone counts. A token is an access key of the owner, the key
# of a user, or a JSON Web Token: RFC 7519 with the algorithm fixed to HS256, which is compared with the token's word
# and never taken from it. Passwords are kept as scrypt hashes (RFC 7914).


class Caller(NamedTuple):
    """Who makes a request."""

    name: str
    admin: bool  # shows an access key of the owner
    user: Optional[User]  # the entry of relay.json, when there is one
    expires: Optional[float] = None  # when the token does, in seconds since 1970

    @property
    def sees_all(self) -> bool:
        """Whether it may see what others do."""
        return self.admin or (self.user is not None and self.user.viewer)


ADMIN = Caller("admin", True, None)
ANONYMOUS = Caller("", False, None)


class TokenError(Unauthenticated):
    """A JWT that isn't accepted."""


class MalformedToken(TokenError):
    """Not three canonical base64url parts of JSON objects."""


class WrongAlgorithm(TokenError):
    """Signed with something else than HS256, or with demands that nobody here understands."""


class BadSignature(TokenError):
    """Not signed with this relay's jwt_secret."""


class ExpiredToken(TokenError):
    """Its `exp` has passed, or it has none."""


class ImmatureToken(TokenError):
    """Its `nbf` or `iat` is in the future."""


class BadClaim(TokenError):
    """A claim is of the wrong type, or not for this use."""


class RevokedToken(TokenError):
    """Its user has another password now, or refuses tokens that are so old."""


# The cost that RFC 7914 §2 calls interactive: 16 MiB and some 50 ms for each try.
SCRYPT_COST, SCRYPT_BLOCK, SCRYPT_PARALLEL = 2**14, 8, 1
# Nobody's password; checking it takes as long as checking a real one.
DUMMY_HASH = f"scrypt${SCRYPT_COST}${SCRYPT_BLOCK}${SCRYPT_PARALLEL}${'A' * 22}${'A' * 43}"


def base64url(data: bytes) -> str:
    """RFC 7515 §2: base64 for URLs without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def from_base64url(part: str) -> bytes:
    """The bytes of an unpadded base64url text; raises ValueError unless it is the only spelling of them."""
    data = base64.b64decode(part.encode("ascii") + b"=" * (-len(part) % 4), altchars=b"-_", validate=True)
    if base64url(data) != part:
        raise ValueError("not canonical")
    return data


def signature(signed: str, secret: str) -> bytes:
    """HS256 of RFC 7518 §3.2 over the first two parts of a token."""
    return hmac.new(secret.encode("utf-8", "surrogateescape"), signed.encode("ascii"), hashlib.sha256).digest()


def sign_token(claims: Mapping[str, Any], secret: str) -> str:
    """The JWT with these claims."""
    parts = ({"alg": "HS256", "typ": "JWT"}, claims)
    signed = ".".join(base64url(json.dumps(part, separators=(",", ":")).encode()) for part in parts)
    return f"{signed}.{base64url(signature(signed, secret))}"


def verify_token(token: str, secret: str, now: float) -> JsonDict:
    """The claims of a JWT signed with the secret and valid at `now` (seconds since 1970). Raises a
    TokenError that says why it isn't."""
    signed, _, given = token.rpartition(".")
    try:
        header_part, claims_part = signed.split(".")
        if len(token) > JWT_BYTES or len(header_part) > JWT_HEADER_BYTES:
            raise ValueError("too long")
        header, signature_given = token_part(header_part), from_base64url(given)
        if header.get("alg") != "HS256" or "crit" in header:
            raise WrongAlgorithm("the token must be signed with HS256 and have no critical extensions")
        # Claims are read only when they are known to be ours: they may be long.
        if not hmac.compare_digest(signature(signed, secret), signature_given):
            raise BadSignature("the token's signature is wrong")
        claims = token_part(claims_part)
    except ValueError:
        raise MalformedToken("the token is no access key, and not a well-formed JWT either") from None
    check_expiry(claims, now)
    check_start(claims, now)
    return claims


def token_part(part: str) -> JsonObject:
    """The JSON object in a token's header or claims. Raises MalformedToken and ValueError."""
    section = parse_json(from_base64url(part).decode("utf-8"))
    if not isinstance(section, JsonObject) or section.repeated:
        raise MalformedToken("the token's header and claims must be JSON objects without repeated names")
    return section


def check_expiry(claims: JsonDict, now: float) -> None:
    """Raises ExpiredToken unless there is an `exp`, and it is later than `now`; BadClaim if it is no number."""
    if now >= numeric_date(claims, "exp", 0):
        raise ExpiredToken("the token has expired, or has no `exp`")


def check_start(claims: JsonDict, now: float) -> None:
    """Raises ImmatureToken if `nbf` or `iat` is more than LEEWAY_SECONDS ahead; BadClaim if one is no number."""
    for name in ("nbf", "iat"):
        if numeric_date(claims, name, now) > now + LEEWAY_SECONDS:
            raise ImmatureToken(f"the token's `{name}` is in the future")


def numeric_date(claims: JsonDict, name: str, default: float) -> float:
    """A claim that is a NumericDate (RFC 7519 §2), or the default. Raises BadClaim for anything else."""
    try:
        return as_number(claims.get(name, default))
    except ValueError:
        raise BadClaim(f"the token's `{name}` must be a number") from None


def subject(claims: JsonDict, kind: str, config: Config) -> str:
    """Whom a token of this type ("access" or "refresh") stands for; one without is for access. Raises BadClaim and
    RevokedToken."""
    name = claims.get("sub")
    if claims.get("type", "access") != kind:
        raise BadClaim(f"this needs a token of the type {kind}")
    if not isinstance(name, str) or not name or not (config.any_subject or name in config.users):
        raise BadClaim("the token's `sub` is not a user of this relay")
    if name in config.users:
        if not config.users[name].enabled:
            raise BadClaim("the token's user is disabled")
        check_not_revoked(claims, config.users[name], config.server.jwt_secret)
    return name


def check_not_revoked(claims: JsonDict, user: User, secret: Optional[Secret]) -> None:
    """Raises RevokedToken if the user's password is no longer that of the time when this relay issued the token, or if
    the token is older than `tokens_since`."""
    if secret and "pwd" in claims and claims["pwd"] != password_mark(user, secret):
        raise RevokedToken("the user's password has changed since the token was issued; log in again")
    if user.tokens_since and numeric_date(claims, "iat", 0) < user.tokens_since:
        raise RevokedToken("the token was issued before the user's `tokens_since`; get a new one")


def password_mark(user: User, secret: Secret) -> str:
    """A fingerprint of a user's password hash, which reveals nothing else about it."""
    return base64url(signature(f"password {user.password}", secret.reveal()))[:16]


def token_claims(name: str, kind: str, lifetime_seconds: int, config: Config, now: float) -> JsonDict:
    """The claims of a token that this relay issues."""
    claims = {"sub": name, "type": kind, "iat": int(now), "exp": int(now) + lifetime_seconds}
    if name in config.users and config.server.jwt_secret:
        claims["pwd"] = password_mark(config.users[name], config.server.jwt_secret)
    return {**claims, "jti": os.urandom(9).hex()}


def identify(tokens: Sequence[str], config: Config, now: float) -> Caller:
    """The caller that shows these tokens, one of which must be valid. Raises Unauthenticated, and BadRequest for
    more tokens than a client has places for."""
    if len(tokens) > SHOWN_TOKENS:
        raise BadRequest("show one token, in `Authorization` or in `x-api-key`, or one in each of them")
    problem: Optional[Unauthenticated] = None
    for token in tokens:
        if len(token) > JWT_BYTES:  # before anything is computed of it, for anybody
            problem = MalformedToken(f"the token is longer than any, it has {len(token)} characters")
            continue
        if is_access_key(token, config.server.access_keys):
            return ADMIN
        owner = config.user_keys.get(fingerprint(token)) if config.user_keys else None
        if owner and config.users[owner].enabled:
            return Caller(owner, False, config.users[owner])
        if token.startswith("sk-"):
            problem = problem or Unauthenticated("this is a provider's key; use the relay's own")
            continue
        if config.server.jwt_secret is None:
            problem = Unauthenticated("the token is not an access key of this relay")
            continue
        try:
            claims = verify_token(token, config.server.jwt_secret.reveal(), now)
            name = subject(claims, "access", config)
            return Caller(name, False, config.users.get(name), claims["exp"])
        except TokenError as error:
            problem = error
    try:
        raise problem or Unauthenticated("a token is needed: send `Authorization: Bearer TOKEN` or `x-api-key: TOKEN`")
    finally:
        problem = None  # else its traceback and this frame would keep each other, and the request


def is_access_key(token: str, keys: Sequence[Secret]) -> bool:
    """Whether the token is one of the keys; every key is compared, in constant time."""
    given = token.encode("latin-1")
    return any([hmac.compare_digest(given, key.reveal().encode("ascii")) for key in keys])


def issue_tokens(name: str, config: Config, secret: Secret, now: float) -> JsonDict:
    """The response to a login: a token pair in the shape of OAuth 2.0 (RFC 6749 §5.1), and the user."""

    def token(kind: str, seconds: int) -> str:
        return sign_token(token_claims(name, kind, seconds, config, now), secret.reveal())

    return {
        "access_token": token("access", ACCESS_TOKEN_SECONDS),
        "refresh_token": token("refresh", REFRESH_TOKEN_SECONDS),
        "token_type": "bearer",
        "expires_in": ACCESS_TOKEN_SECONDS,
        "user": {"username": name},
    }


def scrypt(password: str, salt: bytes, cost: int, block: int, parallel: int) -> bytes:
    """The 32-byte scrypt hash. Raises ValueError for parameters that need over 64 MiB."""
    if not hasattr(hashlib, "scrypt"):
        raise ValueError("this Python was built without scrypt (OpenSSL 1.1 or later)")
    given = password.encode("utf-8", "surrogatepass")
    return hashlib.scrypt(given, salt=salt, n=cost, r=block, p=parallel, maxmem=SCRYPT_MEMORY_BYTES, dklen=32)


def hash_password(password: str) -> str:
    """scrypt$N$r$p$SALT$HASH, salt and hash in base64url, for `users.NAME.password`."""
    salt = os.urandom(16)
    digest = scrypt(password, salt, SCRYPT_COST, SCRYPT_BLOCK, SCRYPT_PARALLEL)
    return f"scrypt${SCRYPT_COST}${SCRYPT_BLOCK}${SCRYPT_PARALLEL}${base64url(salt)}${base64url(digest)}"


def check_password(password: str, hashed: str) -> bool:
    """Whether the hash is this password's; False for a hash that isn't one."""
    match = re.fullmatch(SCRYPT_HASH, hashed)
    if not match:
        return False
    try:
        salt, digest = from_base64url(match[4]), from_base64url(match[5])
        found = scrypt(password, salt, int(match[1]), int(match[2]), int(match[3]))
    except ValueError:
        return False
    return hmac.compare_digest(found, digest)


def network_of(address: str, bits: int = 64) -> str:
    """As whom an address counts: an IPv6 one as its network of so many bits, of which 64 are the least that one
    customer gets (RFC 6177)."""
    if ":" not in address:
        return address
    try:
        found = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    rest = 128 - bits
    return str(found.ipv4_mapped or ipaddress.IPv6Network((int(found) >> rest << rest, bits)))


class Throttle:
    """At most so many events within any minute, for each name. Remembers THROTTLED_NAMES names, those last asked for:
    invented ones must not fill the memory."""

    def __init__(self) -> None:
        self._times: collections.OrderedDict[str, collections.deque[float]] = collections.OrderedDict()

    def wait_seconds(self, name: str, limit: int, now: float) -> float:
        """0.0 if the event may happen, which counts it; else the seconds until the next one may."""
        name = name[:THROTTLED_CHARACTERS]
        times = self._times.setdefault(name, collections.deque())
        self._times.move_to_end(name)
        if len(self._times) > THROTTLED_NAMES:
            self._times.popitem(last=False)
        self._drop_old(times, now)
        if len(times) >= limit:
            return times[0] + 60.0 - now
        times.append(now)
        return 0.0

    def left(self, name: str, limit: int, now: float) -> int:
        """How many events may still happen now."""
        times = self._times.get(name[:THROTTLED_CHARACTERS], collections.deque())
        self._drop_old(times, now)
        return max(0, limit - len(times))

    def _drop_old(self, times: "collections.deque[float]", now: float) -> None:
        while times and times[0] <= now - 60.0:
            times.popleft()


class SharedThrottle:
    """What a Throttle is, for all workers of a relay together: at most so many events within a minute, for each name.

    In the memory that they share, each worker has a row for each name: a hash of the name, then the events of each
    second. It alone writes to its rows, eight bytes at once, of which nobody reads a half: so none waits for another
    one, alive or dead. An event is counted first, and taken back if there are too many then: of two workers that count
    the last one at the same moment, rather both refuse it than both let it through. Where THROTTLED_PROBES rows have
    other names, a new one gets the row of the name that was used longest ago."""

    CELLS = 64  # of a row: there are more than seconds of which the events count
    EMPTY = memoryview(bytes((CELLS - 1) * 8)).cast("Q")
    ROWS = 2 * THROTTLED_NAMES  # so that so many names find room near the places that their hashes give them
    BYTES = ROWS * CELLS * 8  # for each worker; the system gives memory only for what is used

    def __init__(self, cells: memoryview, worker: int) -> None:
        self._cells = cells  # the rows of all workers, in cells of 64 bits
        self._worker = worker
        self._workers = len(cells) * 8 // self.BYTES

    def wait_seconds(self, name: str, limit: int, now: float) -> float:
        """0.0 if the event may happen, which counts it; else the seconds until the next one may."""
        tag = self._tag(name)
        wait = self._wait_seconds(tag, limit - 1, now)
        self._add(tag, math.ceil(now), 0 if wait else 1)  # a refused one shows that the name is in use
        if not wait:
            wait = self._wait_seconds(tag, limit, now)
            if wait:
                self._add(tag, math.ceil(now), -1)
        return wait

    def left(self, name: str, limit: int, now: float) -> int:
        """How many events may still happen now."""
        return max(0, limit - sum(count for _, count in self._counts(self._tag(name), now)))

    @staticmethod
    def _tag(name: str) -> int:
        """What stands for a name in all workers: forked from one process, they hash alike."""
        return hash(name) % 2**64 or 1

    def _wait_seconds(self, tag: int, most: int, now: float) -> float:
        """0.0 if there are at most so many events; else the seconds for which the first of them still count."""
        counts = self._counts(tag, now)
        return min(counts)[0] + 60.0 - now if sum(count for _, count in counts) > most else 0.0

    def _counts(self, tag: int, now: float) -> list[tuple[int, int]]:
        """The events of the last minute that the workers have counted: (end of a second, how many in it)."""
        oldest = (math.floor(now - 60.0) + 1) << 32
        found = (self._row(worker, tag) for worker in range(self._workers))
        rows = [row for row in found if row is not None and self._cells[row]]
        cells = [cell for row in rows for cell in self._cells[row + 1 : row + self.CELLS].tolist() if cell >= oldest]
        return [(cell >> 32, cell & 0xFFFFFFFF) for cell in cells if cell & 0xFFFFFFFF]

    def _add(self, tag: int, second: int, count: int) -> None:
        row = self._row(self._worker, tag)
        if row is None:
            row = min(self._rows(self._worker, tag), key=self._last_use)
            self._cells[row + 1 : row + self.CELLS] = self.EMPTY
        self._cells[row] = tag
        cell = row + 1 + second % (self.CELLS - 1)
        before = max(self._cells[cell], second << 32)  # what it held of an earlier second doesn't count any more
        self._cells[cell] = before + count

    def _row(self, worker: int, tag: int) -> Optional[int]:
        """Where the row begins, or will begin, in which a worker counts a name; None if others have all of its rows."""
        return next((row for row in self._rows(worker, tag) if self._cells[row] in (0, tag)), None)

    def _rows(self, worker: int, tag: int) -> Iterator[int]:
        """Where the rows begin in which a worker may count a name."""
        for number in range(tag, tag + THROTTLED_PROBES):
            yield (worker * self.ROWS + number % self.ROWS) * self.CELLS

    def _last_use(self, row: int) -> int:
        """By which rows are put in the order in which their names were last asked for."""
        return max(self._cells[row + 1 : row + self.CELLS])


# ==== Routing =======================================================================================
#
# A model's name becomes an ordered list of targets: providers, and what the model is called there. Which of them are
# tried, and in what order of keys, is the key pool's business; what stands here depends on relay.json alone, so it is
# worked out once for each name.

ECHO_MODELS = ("echo", "echo-slow", "echo-cut", "echo-tool", "echo-error-529")  # as echo lists them


def resolve(config: Config, name: str) -> list[Target]:
    """The targets of a model name, in order of preference: `name@provider`, an alias, or the first route
    that matches. Raises NotFound with the names that are close, and Unavailable for a disabled provider."""
    targets = find_targets(config, name)
    if not targets:
        close = close_models(config, name)
        known = listing(sorted([*config.aliases, *config.routes])) or "none"
        meant = f", did you mean {' or '.join(close)}?" if close else f"; this relay knows {known}"
        raise NotFound(f"no route for the model {name!r}{meant}", "no_route")
    serving = [target for target in targets if target.provider.serves(target.model)]
    if not serving:
        raise NotFound(f"the `models` of {targets[0].provider.name} don't admit {targets[0].model!r}", "no_route")
    enabled = [target for target in serving if target.provider.enabled]
    if not enabled:
        raise not_usable(serving[0].provider)
    return [target for index, target in enumerate(enabled) if target not in enabled[:index]]


def close_models(config: Config, name: str) -> list[str]:
    """At most three names of models that are close to this one; else patterns whose beginning is close to its own."""
    names = [*config.aliases, *config.routes]
    close = close_matches(name, [*(known for known in names if "*" not in known), *ECHO_MODELS], 3)
    stems = {pattern: pattern.partition("*")[0] for pattern in names[:COMPARED_PATTERNS] if "*" in pattern}
    return close or [pattern for pattern, stem in stems.items() if close_matches(name[: len(stem)], [stem], 1)][:3]


def named_models(config: Config) -> frozenset[str]:
    """The models that relay.json names, as they are sent."""
    entries = [*config.routes, *itertools.chain(*config.aliases.values())]
    return frozenset(split_provider(config, entry)[0] for entry in entries if "*" not in entry)


def find_targets(config: Config, name: str) -> list[Target]:
    """All targets of a name as it stands, or else of the name that it means."""
    return follow(config, name, ()) or follow(config, meant_name(config, name), ())


def meant_name(config: Config, name: str) -> str:
    """What a name that leads nowhere as it stands means: Claude Code leaves `[1m]` on some, and `provider/name` is how
    other gateways say `name@provider`. The name itself where it means no other."""
    shorter = name.removesuffix(LONG_CONTEXT)  # once: to follow a name may take as long as there are routes
    if shorter != name and follow(config, shorter, ()):
        return shorter
    provider, _, model = shorter.partition("/")
    return f"{model}@{provider}" if model and provider in config.providers else shorter


def admits(config: Config, patterns: Sequence[str], name: str) -> bool:
    """Whether the patterns of a user's `models` admit a name. The provider that it picks, behind an @ or before a /, is
    left out: only a pattern that has a / itself is compared with `provider/name` as it stands."""
    meant = meant_name(config, name) if "/" in name and not follow(config, name, ()) else name
    model, _ = split_provider(config, meant)
    with_provider = [pattern for pattern in patterns if "/" in pattern] if meant != name else []
    return matches_any(model, patterns) or matches_any(name, with_provider)


def understands(provider: Provider, format: str, translates: bool) -> bool:
    """Whether a provider can serve requests in the format. `translates`: they are chats, which may be translated."""
    if translates:
        return provider.chat_format == format or provider.translate is not None
    return provider.format in (format, "echo")


def targets_for(config: Config, name: str, format: str, translates: bool = False) -> list[Target]:
    """The usable targets of a model that understand the format, in order of preference; see understands().

    Raises NotFound when no route leads to one, BadRequest when all of them speak the other format, and Unavailable when
    none of them has a key."""
    targets = resolve(config, name)
    speaking = [target for target in targets if understands(target.provider, format, translates)]
    if not speaking:
        other = "/v1/chat/completions" if format == "anthropic" else "/v1/messages"
        raise BadRequest(
            f"the model {name!r} is served by {targets[0].provider.name}, which speaks the other format: use {other}",
            "other_format",
        )
    usable = [target for target in speaking if target.provider.usable]
    if not usable:
        raise not_usable(speaking[0].provider)
    return for_one_credential([unmarked(target) for target in usable] if format == "anthropic" else usable)


def unmarked(target: Target) -> Target:
    """The target; where it speaks OpenAI's format, without the `[1m]` that only Anthropic's clients know."""
    is_marked = target.provider.chat_format == "openai" and target.model.endswith(LONG_CONTEXT)
    return target._replace(model=target.model[: -len(LONG_CONTEXT)] or target.model) if is_marked else target


def for_one_credential(targets: Sequence[Target]) -> list[Target]:
    """The targets to which one request may go: the client's own credential, where they take that, is meant for the
    first of these, and isn't shown to another place."""
    places = [target.provider.origin for target in targets if target.provider.client_keys]
    return [target for target in targets if not target.provider.client_keys or target.provider.origin == places[0]]


def callable_targets(config: Config, name: str, format: str) -> list[Target]:
    """The usable targets of a model for chats in the format, in order of preference; none where one would fail."""
    return [
        target
        for target in find_targets(config, name)
        if target.provider.usable
        and target.provider.serves(target.model)
        and understands(target.provider, format, translates=True)
    ]


def first_provider(config: Config, format: str) -> Provider:
    """The first usable provider of a format, else echo. Raises Unavailable, or NotFound if there is none."""
    speaking = [provider for provider in config.providers.values() if provider.format == format]
    echoes = [provider for provider in config.providers.values() if provider.format == "echo"]
    for provider in (*speaking, *echoes):
        if provider.usable:
            return provider
    if speaking:
        raise not_usable(speaking[0])
    raise NotFound(f"no provider of the format {format} is configured", "no_provider")


def not_usable(provider: Provider) -> Unavailable:
    """The error for a provider that requests can't be sent to."""
    problem, code = "has no key; set one in relay.json or its environment", "provider_has_no_key"
    if not provider.enabled:
        problem, code = "is disabled in relay.json", "provider_disabled"
    return Unavailable(f"the provider {provider.name} {problem}", code, lasts=True)


# ==== Key pool ===================================================================================
#
# What is known of keys that failed. Cooling is a preference and never a ban: candidates that aren't
# cooling come first, then the one that is back soonest, so that a relay with one key answers exactly as
# its provider would.
#
#   429                             the key with this model, until retry-after or for `cooldown`
#   401, 402                        the key, for ten times `cooldown`
#   403, 5xx (529 among them)       the key with this model, for a second, doubling up to `cooldown`
#   no connection, or a broken one  the provider, for a second, doubling up to `cooldown`
#   anything else                   says nothing about a key
#
# Nor do 401, 402 and 403 for a request that isn't routed by its model: it may be the path that the key can't use.
# A success proves the connection, and the key for its own model: it ends what these had, but no retry-after
# before its time. What a request without a model proves of a key is not enough to end the pause after a 401 or 402.
# When the pause of a provider is over that took no connection, one request tries it, and the others still go elsewhere.


class Candidate(NamedTuple):
    """A target with the key to use; `key` is None for a provider that takes none."""

    target: Target
    key: Optional[ProviderKey]

    @property
    def label(self) -> str:
        return self.key.label if self.key else ""

    @property
    def secret(self) -> bytes:
        """The key that no client may see in a response; empty for none, and for one so short that it may be a word."""
        secret = self.key.secret.reveal().encode("ascii") if self.key else b""
        return secret if len(secret) >= SECRET_CHARACTERS else b""


class Cooling:
    """Until when something is avoided and why, how often in a row it failed, and whether a success ends that."""

    __slots__ = ("changed", "failures", "fixed", "known_until", "tried_until", "until", "why")

    def __init__(self) -> None:
        self.until = 0.0
        self.failures = 0
        self.fixed = False  # the provider has named the time
        self.why = ""  # a status, or what stood in the way of a connection
        self.changed = 0.0  # when it last failed or recovered; of two workers' views the later one holds
        self.known_until = 0.0  # how long others may take it for cooling who don't know that it has recovered
        self.tried_until = 0.0  # while one request tries whether it works again: the same as `until`

    def cools(self, now: float) -> bool:
        """Whether it is avoided because it failed, and not because a request tries it just now."""
        return self.until > max(now, self.tried_until)

    def back_off(self, cooldown: float, now: float) -> None:
        """Doubles the pause; failures of requests that were under way together count once."""
        if not self.cools(now):
            self.failures += 1
            self.until, self.fixed = now + min(cooldown, 2.0 ** min(self.failures - 1, 20)), False
            self.tried_until = 0.0

    def recover(self, now: float) -> bool:
        """Ends the pause; whether there was one."""
        failed = self.failures > 0 or self.until > 0.0
        if failed:
            self.known_until, self.changed = max(self.until, self.known_until), now
            self.until, self.failures, self.fixed = 0.0, 0, False
        return failed


class Limit(NamedTuple):
    """What a provider last said of one of its rate limits for a key."""

    used: float  # the fraction of it that is spent
    left: Optional[int]
    of: Optional[int]
    reset: Optional[float]  # when it is whole again, in seconds since 1970
    at: float  # when it was told


RATE_LIMIT = re.compile(
    "anthropic-ratelimit-(?P<kind>[a-z0-9-]{1,30})-(?P<part>limit|remaining|reset|utilization)"
    "|x-ratelimit-(?P<openai_part>limit|remaining|reset)-(?P<openai_kind>requests|tokens)"
)
OPENAI_SPAN = re.compile(
    r"(?:([0-9]{1,6})d)?(?:([0-9]{1,6})h)?(?:([0-9]{1,6})m)?(?:([0-9]{1,6}(?:\.[0-9]{1,9})?)s)?"
    r"(?:([0-9]{1,9})ms)?"
)


def limit_fields(fields: Pairs) -> Pairs:
    """What a response says of the provider's rate limits, with names in lower case."""
    told = [(name.lower(), value[:100]) for name, value in fields if "ratelimit-" in name.lower()]
    return told[:RATE_LIMIT_FIELDS]


def rate_limits(fields: Pairs, now: float) -> dict[str, Limit]:
    """What a response says of the provider's limits for its key, by Anthropic's names in snake case (`requests`,
    `input_tokens`, `unified_5h`). A unified limit tells the fraction that is spent, the others what is left.
    Sources: the headers `anthropic-ratelimit-*`, and OpenAI's `x-ratelimit-*`."""
    told: dict[str, dict[str, str]] = {}
    for name, value in fields:
        match = RATE_LIMIT.fullmatch(name)
        if match:
            kind, part = match["kind"] or match["openai_kind"], match["part"] or match["openai_part"]
            told.setdefault(kind.replace("-", "_"), {})[part] = value
    found = {kind: read_limit(parts, now) for kind, parts in told.items()}
    return {kind: limit for kind, limit in found.items() if limit}


def read_limit(parts: Mapping[str, str], now: float) -> Optional[Limit]:
    """One limit from the values of its headers; None where they don't tell what is spent."""
    numbers = {name: int(value) for name, value in parts.items() if re.fullmatch("[0-9]{1,15}", value)}
    reset, spent = reset_time(parts.get("reset", ""), now), parts.get("utilization", "")
    if re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,9})?", spent):
        return Limit(float(spent), None, None, reset, now)
    left, limit = numbers.get("remaining"), numbers.get("limit")
    return Limit(max(0.0, 1 - left / limit), left, limit, reset, now) if left is not None and limit else None


def reset_time(value: str, now: float) -> Optional[float]:
    """When a limit is whole again, in seconds since 1970: from such seconds, a time by RFC 3339, or OpenAI's
    span such as `1m30s`. None for anything else."""
    if re.fullmatch("[0-9]{9,11}", value):
        return float(value)
    with contextlib.suppress(ValueError):
        return as_moment(value)
    span = OPENAI_SPAN.fullmatch(value)
    if not value or not span:
        return None
    days, hours, minutes, seconds, milliseconds = (float(part or 0) for part in span.groups())
    return now + ((days * 24 + hours) * 60 + minutes) * 60 + seconds + milliseconds / 1000


class KeyRecord:
    """How a key has fared of late, for its owner to see."""

    __slots__ = ("answered", "failed", "hours", "limits", "limits_at", "limits_told", "outcomes")

    def __init__(self) -> None:
        self.outcomes: dict[str, int] = {}  # how many attempts ended so
        self.hours: dict[int, list[int]] = {}  # clock hour: attempts, and how many of them failed
        self.failed: Optional[tuple[float, str]] = None  # when last, and why
        self.answered = 0.0  # when last, and well
        self.limits_told: Pairs = []  # in which the provider last told its rate limits: read when somebody asks
        self.limits_at = 0.0
        self.limits: Optional[list[JsonDict]] = None  # what was read there, once it has been


QUARANTINE_FACTOR = 10  # times `cooldown`: its owner has to do something first
QUARANTINED = frozenset({401, 402})
# Cooling entries name models, which clients may invent: beyond this many, the one begun first is forgotten.
COOLING_ENTRIES = 4096
SHARED_COOLING = 200  # entries that other workers are told of
SHARED_CHARACTERS = 150  # in the model of such an entry; longer ones are invented


class KeyPool:
    """Puts candidates in order and remembers how they fared. Outlives a reload."""

    def __init__(self, chance: random.Random, warn: Callable[[str], object] = lambda message: None) -> None:
        self._chance = chance
        self._warn = warn  # tells the owner what begins to cool, and what recovers
        self._cooling: collections.OrderedDict[tuple[str, ...], Cooling] = collections.OrderedDict()
        self._turns: collections.Counter[str] = collections.Counter()
        self.records: dict[tuple[str, str], KeyRecord] = {}  # of a provider and the label of its key
        self.changed: Callable[[], object] = lambda: None  # called when something cools or has recovered

    def order(self, targets: Iterable[Target], session: str, now: float, is_aside: bool = False) -> list[Candidate]:
        """All candidates of the targets, the one to try first at the head. What has the same `session` stays with one
        key, where the strategy says so. What only asks about a model (`is_aside`) takes no turn: where a client counts
        before each message, the messages would all have the same one of two keys."""
        turns: dict[str, int] = {}
        candidates = [
            Candidate(target, key) for target in targets for key in self._keys_in_turn(target.provider, session, turns)
        ]
        if turns and not is_aside:
            self._turns.update([*turns])
        if not self._cooling:
            return candidates
        return sorted(candidates, key=lambda candidate: max(self._back_at(candidate), now))

    def _keys_in_turn(self, provider: Provider, session: str, turns: dict[str, int]) -> Sequence[Optional[ProviderKey]]:
        """The keys of a provider in the order of its strategy. `turns`: those of the request's providers, of which each
        has one, however many of its targets are there."""
        keys = provider.keys
        if keys is None:
            return (None,)
        if len(keys) < 2 or provider.key_strategy == "fill-first":
            return keys
        if provider.key_strategy == "round-robin":
            turn = turns.setdefault(provider.name, self._turns[provider.name]) % len(keys)
            return (*keys[turn:], *keys[:turn])
        return sorted(keys, key=lambda key: self._rank(provider, key, session), reverse=True)

    def _rank(self, provider: Provider, key: ProviderKey, session: str) -> float:
        """A key's rank for this request, highest first: random, weighted by u**(1/w) (Efraimidis and Spirakis), or,
        for `sticky`, a hash of session and key (rendezvous hashing: a key that comes or goes moves no session
        between the others)."""
        if provider.key_strategy == "random":
            return self._chance.random()
        if provider.key_strategy == "weighted":
            return float(self._chance.random() ** (1 / key.weight))
        digest = hashlib.sha256(f"{session}\0{key.label}".encode("utf-8", "surrogatepass")).digest()
        return float((int.from_bytes(digest[:7], "big") / 2**56) ** (1 / key.weight))

    def _back_at(self, candidate: Candidate) -> float:
        """When nothing of the candidate cools any more; 0.0 if nothing does."""
        entries = map(self._cooling.get, cooldown_keys(candidate))
        return max((entry.until for entry in entries if entry), default=0.0)

    def succeeded(self, candidate: Candidate, now: float) -> None:
        """Ends the cooling of what a success of the candidate has proven to work."""
        if not self._cooling:
            return
        provider, key, key_and_model = cooldown_keys(candidate)
        ended = [provider, key] if candidate.target.model else [provider]
        entry = self._cooling.get(key_and_model)
        if entry and not (entry.fixed and entry.until > now):
            ended.append(key_and_model)
        for name in ended:
            known = self._cooling.get(name)
            if known and known.recover(now):
                self.changed()
                self._warn(f"{cooldown_words(candidate, name)} has recovered")

    def failed(
        self, candidate: Candidate, status: int, retry_after: Optional[float], now: float, by_model: bool = True
    ) -> None:
        """Notes a response with a status of failure. `by_model`: whether the request was routed by its model."""
        cooldown = candidate.target.provider.cooldown
        _, key, key_and_model = cooldown_keys(candidate)
        name = key if status in QUARANTINED else key_and_model
        if status in (403, *QUARANTINED) and not (by_model and candidate.target.model):
            return
        if status not in (429, 403, *QUARANTINED) and status < 500:
            return
        entry = self._entry(name)
        was_cooling = entry.until > now
        if status == 429:
            if retry_after is not None or not (entry.fixed and was_cooling):
                entry.until = now + (cooldown if retry_after is None else retry_after)
                entry.fixed = retry_after is not None
        elif status in QUARANTINED:
            entry.until = now + QUARANTINE_FACTOR * cooldown
        else:
            entry.back_off(cooldown, now)
        self._note_cooling(candidate, name, str(status), was_cooling, now)

    def unreachable(self, candidate: Candidate, now: float) -> None:
        """Notes a connection that failed."""
        name, _, _ = cooldown_keys(candidate)
        entry = self._entry(name)
        was_cooling = entry.cools(now)
        entry.back_off(candidate.target.provider.cooldown, now)
        self._note_cooling(candidate, name, "no connection", was_cooling, now)

    def connecting(self, candidate: Candidate, now: float) -> None:
        """Notes that a connection is tried. Where the last one failed, other requests go elsewhere meanwhile: else all
        of them would wait for a provider that takes none, whenever its pause is over."""
        entry = self._cooling.get(cooldown_keys(candidate)[0])
        if entry and entry.failures and entry.until <= now:
            entry.until = entry.tried_until = now + candidate.target.provider.connect_timeout
            entry.changed = now
            self.changed()

    def end_try(self, candidate: Candidate, now: float) -> None:
        """Notes that a try is over, however it ended: its client may have left."""
        entry = self._cooling.get(cooldown_keys(candidate)[0])
        if entry and entry.tried_until > now:
            entry.known_until = entry.until
            entry.until = entry.tried_until = entry.changed = now
            self.changed()

    def _note_cooling(
        self, candidate: Candidate, name: tuple[str, ...], why: str, was_cooling: bool, now: float
    ) -> None:
        """Notes why something cools, and warns when it has just begun to."""
        entry = self._cooling[name]
        entry.why, entry.changed = why, now
        self.changed()
        if not was_cooling:
            self._warn(f"{cooldown_words(candidate, name)} comes last for {round(entry.until - now, 2):.7g} s: {why}")

    def note(self, candidate: Candidate, outcome: str, clock: float) -> None:
        """Notes what became of an attempt: `ok`, or what it met. `clock` is in seconds since 1970."""
        record, hour = self._record(candidate), int(clock // 3600)
        record.outcomes[outcome] = record.outcomes.get(outcome, 0) + 1
        counts = record.hours.get(hour)
        if counts is None:
            record.hours = {known: record.hours[known] for known in record.hours if known == hour - 1}
            counts = record.hours[hour] = [0, 0]
        counts[0] += 1
        if outcome == "ok":
            record.answered = clock
        else:
            counts[1] += 1
            record.failed = (clock, outcome)

    def note_limits(self, candidate: Candidate, fields: "Headers", clock: float) -> None:
        """Notes what a response says of the provider's limits for a key, if it does."""
        if "ratelimit-" in ",".join(fields.names):
            record, told = self._record(candidate), fields.pairs
            if len(told) > KEPT_FIELDS or sum(map(len, itertools.chain.from_iterable(told))) > LONG_HEAD_BYTES:
                told = limit_fields(told)  # else a long head would be held for each key
            record.limits_told, record.limits_at, record.limits = told, clock, None

    def _record(self, candidate: Candidate) -> KeyRecord:
        name = (candidate.target.provider.name, candidate.label)
        record = self.records.get(name)
        if record is None:
            record = self.records[name] = KeyRecord()
        return record

    def cooling(self, now: float) -> dict[tuple[str, ...], list[tuple[str, Cooling]]]:
        """What cools for requests to models, by (provider,) or (provider, mark of the key): pairs of a model, empty for
        all of them, and its entry."""
        found: dict[tuple[str, ...], list[tuple[str, Cooling]]] = {}
        for name, entry in self._cooling.items():
            if entry.until > now and name[2:] != ("",):
                found.setdefault(name[:2], []).append((name[2] if len(name) > 2 else "", entry))
        return found

    def shared(self, now: float) -> list[list[Any]]:
        """The entries for the other workers: of what cools, or may still be taken for cooling by them. Of too many,
        those of whole providers and keys, then those that changed last. None of models whose names are long or odd:
        such are invented to take room."""
        known = [
            (name, entry)
            for name, entry in self._cooling.items()
            if max(entry.until, entry.known_until) > now
            and (len(name) < 3 or (len(name[2]) <= SHARED_CHARACTERS and name[2].isascii()))
        ]
        known.sort(key=lambda one: (len(one[0]), -one[1].changed))
        return [
            [list(name), entry.until, entry.failures, entry.fixed, entry.why, entry.changed, entry.known_until]
            for name, entry in known[:SHARED_COOLING]
        ]

    def adopt(self, shared: Iterable[list[Any]]) -> None:
        """Takes over what other workers know better, since it happened later."""
        for listed_name, until, failures, fixed, why, changed, known_until in shared:
            name = tuple(listed_name)
            own = self._cooling.get(name)
            if own is None or own.changed < changed:
                entry = self._entry(name)
                entry.until, entry.failures, entry.fixed, entry.why = until, failures, fixed, why
                entry.changed, entry.known_until, entry.tried_until = changed, known_until, 0.0

    def forget(self, now: float) -> None:
        """Forgets what has recovered, once nobody takes it for cooling any more."""
        for name in [name for name, entry in self._cooling.items() if not entry.until and entry.known_until <= now]:
            del self._cooling[name]

    def _entry(self, name: tuple[str, ...]) -> Cooling:
        if name not in self._cooling and len(self._cooling) >= COOLING_ENTRIES:
            self._cooling.popitem(last=False)
        return self._cooling.setdefault(name, Cooling())


def key_states(
    providers: Iterable[Provider], pool: KeyPool, records: Mapping[tuple[str, str], JsonDict], now: float, clock: float
) -> list[JsonDict]:
    """How each key of the enabled providers is, for their owner to see. `records`: of a provider and the label of its
    key, as record_document() has them. `now` is on the monotonic clock, `clock` in seconds since 1970."""
    states, all_cooling, unused = [], pool.cooling(now), record_document(KeyRecord())
    for provider in providers:
        keys: Sequence[Optional[ProviderKey]] = provider.keys or (None,)
        for key in keys if provider.enabled else ():
            candidate = Candidate(Target(provider, ""), key)
            record = {**records.get((provider.name, candidate.label), unused)}
            names = cooldown_keys(candidate)[:2]
            cooling = [entry for name in names for entry in all_cooling.get(name, ())]
            hours = [counts for hour, *counts in record.pop("hours") if hour >= clock // 3600 - 1]
            record["requests"], record["errors"] = sum(total for total, _ in hours), sum(failed for _, failed in hours)
            record["limits"] = [limit for limit in record["limits"] if not limit["reset"] or limit["reset"] > clock]
            state = {"provider": provider.name, "key": candidate.label, **key_state(provider, cooling, now)}
            states.append({**state, **record})
    return states


def key_state(provider: Provider, cooling: Sequence[tuple[str, Cooling]], now: float) -> JsonDict:
    """Whether a key can be used, and why not: `models` are those that cool, if not all of them do."""
    usual = "echo" if provider.format == "echo" else "client" if provider.client_keys else "ok"
    state: JsonDict = {"state": usual, "for": None, "why": None, "models": None}
    if not provider.usable:
        return {**state, "state": "missing", "why": f"set a key for {provider.name}"}
    if cooling:
        whole = [entry for model, entry in cooling if not model] or [entry for _, entry in cooling]
        longest = max(whole, key=lambda entry: entry.until)
        models = sorted({model for model, _ in cooling})[:8]
        state |= {"state": "cooling", "for": round(longest.until - now, 1), "why": longest.why}
        state["models"] = None if "" in models else models
    return state


def record_document(record: KeyRecord) -> JsonDict:
    """A KeyRecord as JSON."""
    if record.limits is None:
        limits = rate_limits(limit_fields(record.limits_told), record.limits_at)
        record.limits = [{"limit": name, **limit._asdict()} for name, limit in limits.items()]
    return {
        "outcomes": dict(record.outcomes),
        "hours": [[hour, *counts] for hour, counts in record.hours.items()],
        "failed": record.failed,
        "answered": record.answered,
        "limits": record.limits,
    }


def records_by_key(shown: Iterable[list[list[Any]]]) -> dict[tuple[str, str], JsonDict]:
    """What several workers show of keys: provider, label and record_document() of each, joined by key."""
    known: dict[tuple[str, str], list[JsonDict]] = {}
    for provider, label, document in itertools.chain.from_iterable(shown):
        known.setdefault((provider, label), []).append(document)
    return {name: joined_records(documents) for name, documents in known.items()}


def joined_records(records: Iterable[JsonDict]) -> JsonDict:
    """The records that several workers have of a key, as one."""
    outcomes: collections.Counter[str] = collections.Counter()
    hours: collections.Counter[int] = collections.Counter()
    failures: collections.Counter[int] = collections.Counter()
    limits: dict[str, JsonDict] = {}
    failed, answered = None, 0.0
    for record in records:
        outcomes.update(record["outcomes"])
        for hour, total, failing in record["hours"]:
            hours[hour] += total
            failures[hour] += failing
        # From the board it comes as a list, which doesn't compare with a tuple.
        failed = max(filter(None, (failed, record["failed"] and tuple(record["failed"]))), default=None)
        answered = max(answered, record["answered"])
        for limit in record["limits"]:
            if limit["limit"] not in limits or limits[limit["limit"]]["at"] < limit["at"]:
                limits[limit["limit"]] = limit
    counts = [[hour, total, failures[hour]] for hour, total in hours.items() if hour >= max(hours) - 1]
    told = {"outcomes": outcomes, "hours": counts, "failed": failed, "answered": answered}
    return {**told, "limits": list(limits.values())}


def cooldown_words(candidate: Candidate, name: tuple[str, ...]) -> str:
    """An entry of the cooldown table in words: a candidate's provider, its key, or its key with the model."""
    words = [f"the provider {candidate.target.provider.name}"]
    if len(name) > 1:
        words.append(f"key {candidate.label}" if candidate.key else "no key")
    if len(name) > 2:
        words.append(f"model {name[2]}" if name[2] else "any request without a model")
    return ", ".join(words)


def cooldown_keys(candidate: Candidate) -> tuple[tuple[str, ...], ...]:
    """The three keys of a candidate in the cooldown table: provider; provider and key; provider, key and model."""
    provider = candidate.target.provider.name
    mark = candidate.key.mark if candidate.key else ""
    return (provider,), (provider, mark), (provider, mark, candidate.target.model)


# ==== Ledger rules ==================================================================================
#
# What a response used, what that costs, and when a budget is spent. The kinds of tokens are disjoint, so that nothing
# is charged twice: what was read from a cache or written to it isn't `input`, whatever a provider's total includes.
#
#   kind              Anthropic                                        OpenAI, chat and Responses
#   input             input_tokens                                     prompt_tokens or input_tokens, less the next 3
#   cache_read        cache_read_input_tokens                          …_details.cached_tokens
#   cache_write       cache_creation_input_tokens less those below     …_details.cache_write_tokens less those below
#   cache_write_long  cache_creation.ephemeral_1h_input_tokens         …cache_write_tokens_details.ttl_12h_tokens
#   output            output_tokens                                    completion_tokens or output_tokens
#
# What a response doesn't tell is None and never guessed. A cost is what a price list makes of that, in 10^-9 USD: an
# estimate, since discounts, credits and what pictures cost apart from text aren't in it. Where a list leaves a rate
# out, the cost is rather dearer than true than cheaper. A budget is checked before a request and charged after it,
# never reserved.


class Used(NamedTuple):
    """What a response used. A kind is None where the response told nothing."""

    input: Optional[int] = None
    cache_read: Optional[int] = None
    cache_write: Optional[int] = None
    cache_write_long: Optional[int] = None
    output: Optional[int] = None
    tier: str = ""  # the service tier; empty for the standard one
    speed: str = ""  # empty for the usual one
    geo: str = ""  # where it was computed
    web_searches: int = 0
    thinks: bool = False  # whether some of the output was thought: Alibaba charges more for all of it then
    heard: int = 0  # how much of the input was sound,
    spoken: int = 0  # and of the output
    # Model, empty for the response's own, and what it used. Where there are any, the cost is the sum over them: some
    # are another model's, and some aren't in the totals (a compaction).
    iterations: tuple[tuple[str, "Used"], ...] = ()


NOTHING_TOLD = Used()


def used_of(usage: Any, service_tier: str = "") -> Used:
    """What the usage object of a response tells, in either format; of a stream, its objects merged into one. Where the
    object has no service tier, the one given beside it counts. What is no sound count is as if not named."""
    if not isinstance(usage, dict):
        return NOTHING_TOLD
    tier, speed = usage.get("service_tier") or service_tier or vertex_tier(usage), usage.get("speed")
    details = usage.get("completion_tokens_details") or usage.get("output_tokens_details")
    read = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    read = read or usage.get("input_token_details")  # of transcriptions
    used = Used(
        *tokens_of(usage),
        "" if tier in ("standard", "default") else word_of(tier),
        "" if speed in ("standard", None) else word_of(speed),
        word_of(usage.get("inference_geo")),
        searches_of(usage),
        isinstance(details, dict) and bool(details.get("reasoning_tokens")),
        sound_in(read),
        sound_in(details),
    )
    steps = tuple(iterations_of(usage["iterations"], used)) if "iterations" in usage else ()
    return used._replace(iterations=steps) if 0 < len(dict(steps)) <= ITERATED_MODELS else used


def vertex_tier(usage: JsonDict) -> str:
    """The service tier, where Vertex AI tells it in words of its own; else empty."""
    properties = usage.get("extra_properties")
    google = properties.get("google") if isinstance(properties, dict) else None
    traffic = google.get("traffic_type") if isinstance(google, dict) else None
    return {"ON_DEMAND_PRIORITY": "priority", "ON_DEMAND_FLEX": "flex"}.get(word_of(traffic), "")


def sound_in(details: Any) -> int:
    """How many of the tokens of which these details tell are sound."""
    is_told = isinstance(details, dict) and details.get("audio_tokens")
    return counts_of(details).get("audio_tokens", 0) if is_told else 0


def iterations_of(listed: Any, used: Used) -> Iterator[tuple[str, Used]]:
    """The steps of which a response tells, each with the tier, speed and place of the whole. A model that declined
    before it said anything, so that another one answered, isn't billed
    (https://platform.claude.com/docs/en/build-with-claude/refusals-and-fallback)."""
    if not isinstance(listed, list) or len(listed) > USAGE_ITERATIONS:
        return
    entries = [entry for entry in listed if isinstance(entry, dict)]
    is_fallback = any(entry.get("type") == "fallback_message" for entry in entries)
    for entry in entries:
        tokens = tokens_of(entry)
        if tokens is not NO_TOKENS and not (is_fallback and entry.get("type") == "message" and not tokens[-1]):
            model = entry.get("model")
            name = model if isinstance(model, str) and len(model) <= MODEL_CHARACTERS else ""
            yield name, Used(*tokens, used.tier, used.speed, used.geo)


def searches_of(usage: JsonDict) -> int:
    """How often the web was searched: as Anthropic and OpenRouter tell it; xAI; Mistral; Perplexity's agent; Alibaba;
    LiteLLM; and Perplexity's chat, which searches for each answer, and tells how often only where that is more than
    once."""
    if usage.get("server_tool_use"):
        return counts_of(usage["server_tool_use"]).get("web_search_requests", 0)
    if "server_side_tool_usage_details" in usage:
        counts = counts_of(usage["server_side_tool_usage_details"])
        return counts.get("web_search_calls", 0) + counts.get("x_search_calls", 0)
    if usage.get("connectors"):
        counts = counts_of(usage["connectors"])
        return counts.get("web_search", 0) + counts.get("web_search_premium", 0)
    tools = usage.get("tool_calls_details") or usage.get("x_tools")
    if isinstance(tools, dict):
        told = [counts_of(tool) for name, tool in tools.items() if "search" in name]
        return sum(counts.get("invocation", counts.get("count", 0)) for counts in told)
    if usage.get("search_context_size") or usage.get("num_search_queries"):
        return counts_of(usage).get("num_search_queries", 1)
    return counts_of(usage.get("prompt_tokens_details")).get("web_search_requests", 0)


def with_others(used: Used, others: Sequence[JsonDict]) -> Used:
    """What a picture or a response used, together with the models that have drawn for it, or written pictures as SVG,
    by the prices of these."""
    steps = tuple(iterations_of(others, used))
    if not steps:
        return used
    all_used = [used, *(step for _, step in steps)]
    counts: JsonDict = {kind: sum(getattr(one, kind) or 0 for one in all_used) for kind in KINDS}
    return used._replace(**counts, iterations=(("", used), *steps))


Tokens = tuple[Optional[int], Optional[int], Optional[int], Optional[int], Optional[int]]  # by KINDS
NO_TOKENS: Tokens = (None, None, None, None, None)


def tokens_of(usage: JsonDict) -> Tokens:
    """The tokens by kind. What the object doesn't name is 0, unless it names none at all."""
    counts, split = counts_of(usage), counts_of(usage.get("cache_creation"))
    brief, lasting = split.get("ephemeral_5m_input_tokens"), split.get("ephemeral_1h_input_tokens")
    includes = False  # whether the total has what was read and written in it
    if OPENAI_NAMES.isdisjoint(usage):
        total, read, write, output = map(counts.get, ANTHROPIC_NAMES)
        if usage.keys().isdisjoint(ANTHROPIC_NAMES):  # Voyage's embeddings, and documents that are ranked: no output
            total = counts.get("total_tokens") or None
    else:
        given = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
        details = counts_of(given)
        total = counts.get("prompt_tokens") or counts.get("input_tokens")  # new-api tells both, some as 0
        if counts.get("connector_tokens"):  # what Mistral's tools have read
            total = (total or 0) + counts["connector_tokens"]
        output = counts.get("completion_tokens") or counts.get("output_tokens")
        cached = details.get("cached_read_tokens", details.get("cached_tokens"))
        written = max(map(details.__getitem__, details.keys() & WRITTEN_NAMES), default=None)
        includes = "prompt_tokens" in counts or cached is not None or written is not None
        # DeepSeek, Moonshot and Mistral have names of their own for what was read.
        read = cached or next((counts[name] for name in CACHED_NAMES if name in counts), None)
        write = written or counts.get("cache_creation_input_tokens")
        if write and not lasting:
            lasting = lasting_writes(given) or counts.get("claude_cache_creation_1_h_tokens", 0)  # the latter: new-api
        untold = counts.get("total_tokens", 0) - (total or 0) - (output or 0)
        if untold > 0:
            thought = thought_beside(untold, usage, cached or 0, written or 0)
            output = (output or 0) + thought if thought else output
    if not includes and total is output is read is write is brief is lasting is None:
        return NO_TOKENS
    total, read, lasting = total or 0, read or 0, lasting or 0
    # A stream's last total rules: an earlier split by lifetime may not add up to it.
    write = (brief or 0) + lasting if write is None else write
    if includes:
        read = min(read, total)
        write = min(write, total - read)
        total -= read + write
    lasting = min(lasting, write)
    return total, read, write - lasting, lasting, output or 0


PROMPT_NAMES = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
ANTHROPIC_NAMES = (*PROMPT_NAMES, "output_tokens")
OPENAI_NAMES = frozenset({
    "prompt_tokens", "completion_tokens", "prompt_tokens_details", "input_tokens_details", "prompt_cache_hit_tokens",
    "cached_tokens",
})  # fmt: skip
CHAT_TOTALS = frozenset({"prompt_tokens", "completion_tokens", "total_tokens"})
GEMINI_NAMES = CHAT_TOTALS | {"prompt_tokens_details", "completion_tokens_details", "service_tier"}
CACHED_NAMES = ("cache_read_input_tokens", "prompt_cache_hit_tokens", "cached_tokens", "num_cached_tokens")
# What was written to a cache, in the details of a prompt: by OpenAI, Alibaba, LiteLLM, Bifrost (whose older ones count
# it in `cached_tokens`, too) and new-api.
WRITTEN_NAMES = frozenset({
    "cache_write_tokens", "cache_creation_input_tokens", "cache_creation_tokens", "cached_write_tokens",
    "cached_creation_tokens",
})  # fmt: skip


def told_anew(usage: JsonDict, names: Iterable[str]) -> JsonDict:
    """What a usage of a message tells by these names, over what one before it has told: nothing of the prompt where all
    of that is 0, as some gateways repeat it in message_delta."""
    tells_prompt = any(map(usage.get, PROMPT_NAMES)) or any(counts_of(usage.get("cache_creation")).values())
    left_out = () if tells_prompt else (*PROMPT_NAMES, "cache_creation")
    return {name: usage[name] for name in names if usage.get(name) is not None and name not in left_out}


def lasting_writes(details: Any) -> int:
    """What was written to a cache for an hour or more, as OpenAI's details of a prompt tell it, and those of LiteLLM
    and Bifrost in front of Claude."""
    if not isinstance(details, dict):
        return 0
    hours = counts_of(details.get("cache_creation_token_details"))
    told = counts_of(details.get("cache_write_tokens_details")).get("ttl_12h_tokens", 0)
    told = told or counts_of(details.get("cached_write_token_details")).get("cached_write_tokens_1h", 0)
    return told or hours.get("ephemeral_1h_input_tokens", 0) + hours.get("ephemeral_12h_input_tokens", 0)


def thought_beside(untold: int, usage: JsonDict, cached: int, written: int) -> int:
    """How many of these tokens, which only the total counts, were thought: xAI, Copilot, Vertex AI and gateways in
    front of Gemini tell of them apart, Gemini doesn't. Its total has what its tools have read, too."""
    details = counts_of(usage.get("completion_tokens_details") or usage.get("output_tokens_details"))
    thought = details.get("reasoning_tokens") or counts_of(usage).get("reasoning_tokens", 0)
    if untold != thought and untold in (cached, written, cached + written):
        return 0
    if thought:
        return thought if thought <= untold else 0
    return untold if CHAT_TOTALS <= usage.keys() <= GEMINI_NAMES else 0


def counts_of(section: Any) -> dict[str, int]:
    """The sound counts of an object, 20.0 too; none if it isn't one."""
    if not isinstance(section, dict):
        return {}
    return {
        name: int(value)
        for name, value in section.items()
        if (type(value) is int or (type(value) is float and value % 1 == 0)) and 0 <= value <= USAGE_COUNT
    }


USAGE_WORD = re.compile(rf"[A-Za-z0-9_.-]{{1,{USAGE_WORD_CHARACTERS}}}")


def word_of(value: Any) -> str:
    """A word of a provider, such as a service tier; empty if it is none, or a long one."""
    return value if isinstance(value, str) and USAGE_WORD.fullmatch(value) else ""


WEB_SEARCH_USD = 0.01  # what both APIs charge for each
# How LiteLLM's list calls them where it isn't as the APIs do. What OpenAI called priority is `fast` in answers of GPT-6
# (https://developers.openai.com/api/docs/guides/fast-mode).
SERVICE_TIERS = {"batch": "batches", "fast": "priority"}
# What a rate that isn't given is, as a part of the input's. OpenAI bills writes so since GPT-5.6; of earlier models,
# and of others that speak its format, it is rather dearer than true.
RATE_FACTORS = {
    "anthropic": {"cache_read": 0.1, "cache_write": 1.25, "cache_write_long": 2.0},
    "openai": {"cache_read": 1.0, "cache_write": 1.25, "cache_write_long": 2.5},
}
SOUNDS = {"input": "heard", "output": "spoken"}  # what of a kind was sound, as it is called in Used and in rates
# How many times the usual rates it costs what a list has no rates for, in PRICE_UNIT: at most, by what OpenAI and
# Anthropic charge.
DEAR_TIERS = {"priority": 5 * PRICE_UNIT // 2, "ultrafast": 6 * PRICE_UNIT}
DEAR_SPEEDS = {"fast": 2 * PRICE_UNIT}
DEAR_PLACES = {"us": 11 * PRICE_UNIT // 10}
# What a price list leaves out of a name: a date; the owner of a tuned model; `models/`, with which Google lists each;
# OpenRouter's choice of how a model is served (https://openrouter.ai/docs/guides/routing/model-variants/overview); and
# Claude Code's mark of a long context, which some servers take.
UNPRICED_PART = re.compile(
    r"^models/|[-@](?:20[0-9]{6}|20[0-9]{2}-[0-9]{2}-[0-9]{2})$|(?<=^ft:)([^:]+):.*"
    r"|:(?:nitro|floor|exacto|online|thinking|extended|batch)$|\[1m\]$"
)
UNPRICED_PARTS = 4  # so many are left out, one after the other


def cost_of(prices: Optional[Prices], provider: Provider, model: str, used: Used) -> Optional[int]:
    """What a response of the model, named as it was sent to the provider, costs in 10^-9 USD; None without a price or
    without tokens. What stands beside its own usage may be what a client has sent, and never makes it cheaper: what
    another model used has the response's own price where that model's isn't known, and what can't be true costs
    PARTS_NANO_USD."""
    if not prices or (used.input is None and used.output is None):
        return None
    steps = used.iterations or (("", used),)
    found = {name: find_price(prices, provider, name or model) for name in dict(steps)}
    if "" not in found and any(found.values()):  # Anthropic names the response's own model, too
        found[""] = find_price(prices, provider, model)
    total = used.web_searches * exact(WEB_SEARCH_USD) * PRICE_UNIT**2
    for name, step in steps:
        charge = charge_of(found[name], provider.format, step)
        if charge is None:
            charge = charge_of(found.get(""), provider.format, step)
        if charge is None:
            return None
        total += charge
    cost = (2 * total * 10**9 // PRICE_UNIT**3 + 1) // 2  # rounded once, and half a unit up
    if used.iterations or used.web_searches:
        return min(cost, PARTS_NANO_USD)
    return cost if cost <= COST_NANO_USD else None


def dearer(one: Optional[int], other: Optional[int]) -> Optional[int]:
    """The higher of two costs, or the one that is known."""
    return other if one is None else one if other is None else max(one, other)


def charge_of(price: Optional[Price], format: str, used: Used) -> Optional[int]:
    """What the tokens cost, in PRICE_UNIT times two factors of that unit; None without a price."""
    if not price:
        return None
    counts = {kind: getattr(used, kind) or 0 for kind in KINDS}
    prompt = sum(counts.values()) - counts["output"]
    tier = SERVICE_TIERS.get(used.tier, used.tier)
    level = level_of(price.rates, tier, prompt)
    total = 0
    for kind, count in counts.items():
        if count:
            rate = rate_of(price.rates, kind, level, format)
            if rate is None:
                return None
            if kind == "output" and used.thinks:
                rate = max(rate, rate_of(price.rates, "thinking", level, format) or 0)
            total += count * rate
            sound = SOUNDS.get(kind, "")
            if sound and getattr(used, sound):
                dear = rate_of(price.rates, sound, level, format) or 0
                total += min(count, getattr(used, sound)) * max(0, dear - rate)
    place_factor = price.factors.get(used.geo, DEAR_PLACES.get(used.geo, PRICE_UNIT))
    return total * dear_factor(price, format, tier, used.speed) * place_factor


def dear_factor(price: Price, format: str, tier: str, speed: str) -> int:
    """How many times the rates it costs, in PRICE_UNIT, by its speed, or by a tier without rates of its own.
    Anthropic's `priority` is paid for in advance."""
    if speed in price.factors:
        return price.factors[speed]
    factor = DEAR_SPEEDS.get(speed, PRICE_UNIT)
    if format != "anthropic" and ("input", tier, 0) not in price.rates:
        factor = max(factor, DEAR_TIERS.get(tier, PRICE_UNIT))
    return factor


def plain_names(model: str) -> list[str]:
    """The name of a model, and what is left of it without one UNPRICED_PART after the other: a date may stand before
    OpenRouter's choice, of which there may be two."""
    names = [model]
    for _ in range(UNPRICED_PARTS):
        plain = UNPRICED_PART.sub(r"\1", names[-1])
        if plain == names[-1]:
            break
        names.append(plain)
    return names


def find_price(prices: Prices, provider: Provider, model: str) -> Optional[Price]:
    """The price of a model by one of its plain_names(), or by the provider's name before one; exact names go before
    patterns, of which the first counts that matches one of these."""
    names = plain_names(model)
    names += [f"{provider.name}/{name}" for name in names]
    for name in names:
        if name in prices.by_name:
            return prices.by_name[name]
    for pattern, price in prices.by_pattern:  # of relay.json's own prices these are all, also those without a mark
        expression = shell_pattern(pattern)
        if pattern in names or (expression and any(map(expression.match, names))):
            return price
    return None


def level_of(rates: Mapping[tuple[str, str, int], int], tier: str, prompt: int) -> tuple[str, int]:
    """The service tier, and the size of the prompt in thousands, by whose rates the whole request is charged: where
    the list doesn't have both together, the dearer of the two."""
    sizes = [above for kind, named, above in rates if kind == "input" and named in ("", tier) and prompt > above * 1000]
    above = max(sizes, default=0)
    if ("input", tier, above) in rates:
        return tier, above
    levels = [level for level in ((tier, 0), ("", above)) if ("input", *level) in rates]
    if len(levels) == 1:
        return levels[0]
    return max(levels, key=lambda one: [rates.get((kind, *one), 0) for kind in ("input", "output")], default=("", 0))


def rate_of(rates: Mapping[tuple[str, str, int], int], kind: str, level: tuple[str, int], format: str) -> Optional[int]:
    """The rate of a kind at a level: as given; else what it is in general, in the proportion of the input's rates; else
    the usual part of the input's. None if the list knows none."""
    given = rates.get((kind, *level))
    if given is not None:
        return given
    usual, asked = rates[("input", "", 0)], rates.get(("input", *level), 0)
    if (kind, "", 0) in rates:
        general = rates[(kind, "", 0)]
        return general * asked // usual if usual else general
    factor = RATE_FACTORS.get(format, RATE_FACTORS["openai"]).get(kind)
    return None if factor is None else asked * exact(factor) // PRICE_UNIT


class LedgerRow(NamedTuple):
    """A request to a model that has ended, as the ledger keeps it: whose it was, where it went, and what it used.
    What isn't known is None. No bodies, headers or addresses."""

    at: int  # when it ended, in milliseconds since 1970
    request: str  # its id
    user: str
    model: str  # as it was asked for
    sent: str  # as it was sent
    provider: str
    key: str  # its label
    path: str
    status: int
    stream: int
    attempts: int
    ttfb: Optional[int]  # milliseconds, as duration
    duration: int
    input: Optional[int]
    cache_read: Optional[int]
    cache_write: Optional[int]
    cache_write_long: Optional[int]
    output: Optional[int]
    tier: Optional[str]  # None: the standard one
    cost: Optional[int]  # 10^-9 USD
    complete: int  # whether all of the response went out
    error: Optional[str]
    tried: Optional[str] = None  # what each failed attempt met

    @property
    def failed(self) -> bool:
        """Whether it counts as an error: a client that leaves is none."""
        return (self.status or 0) >= 400 or self.error not in (None, "", "client_gone")

    def is_of(self, user: Optional[str]) -> bool:
        """Whether it is one of the user's; of None's, each is."""
        return user is None or self.user == user

    def matches(self, names: Mapping[str, str], errors: bool) -> bool:
        """Whether it is one of those asked for by user, model, key (label or provider/label), or by having failed."""
        return (
            names.get("user", self.user) == self.user
            and names.get("model", self.sent) in (self.model, self.sent)
            and names.get("key", self.key) in (self.key, f"{self.provider}/{self.key}")
            and (self.failed or not errors)
        )

    @property
    def answered(self) -> bool:
        """Whether a model has answered, and not with an error."""
        return 200 <= (self.status or 0) < 300

    @property
    def untold(self) -> bool:
        """Whether it was answered without saying what that used."""
        return self.answered and (self.input is None or self.output is None)

    @property
    def figures(self) -> tuple[int, ...]:
        """What it adds to SUMS."""
        streamed = int(bool(self.stream) and self.ttfb is not None)
        return (
            1, int(self.failed), int(self.untold), self.input or 0, self.cache_read or 0, self.cache_write or 0,
            self.cache_write_long or 0, self.output or 0, self.cost or 0, (self.ttfb or 0) * streamed, streamed,
            self.duration or 0,
        )  # fmt: skip


OTHER = "(other)"  # in the place of names that can't be told apart, since clients may invent any number of them
SUMS = ("requests", "errors", "untold", *KINDS, "cost", "ttfb", "streamed", "duration")
COST = SUMS.index("cost")
GROUPS = ("user", "model", "provider", "key")  # by which they are told apart
USER, PROVIDER, KEY = GROUPS.index("user"), GROUPS.index("provider"), GROUPS.index("key")
Sums = list[Optional[int]]
Groups = list[tuple[JsonDict, Sums]]  # the names of each group, and what it adds up to
HourKey = tuple[int, str, str, str, str]  # hour since 1970, user, model, provider, key
Spent = dict[tuple[str, str], tuple[int, int]]  # by user and window: 10^-9 USD, tokens


def figures_of(rows: Iterable[LedgerRow]) -> list[int]:
    """What the rows, one at least, add to SUMS."""
    return [*map(sum, zip(*[row.figures for row in rows]))]


def hour_sums(rows: Iterable[LedgerRow], find_models: Callable[[int, str], Iterable[str]]) -> dict[HourKey, Sums]:
    """What the rows add to the table `hour`: the columns SUMS by hour, user, model, provider and key. `find_models`:
    the models that it has already of a user in an hour. More than LEDGER_MODELS of them are one: echo answers for any
    name that a client invents, and so do some servers."""
    alike: dict[HourKey, list[LedgerRow]] = {}
    known: dict[tuple[int, str], set[str]] = {}
    for row in rows:
        # What SQLite doesn't take was made None by storable().
        model = (row.sent or row.model or "") if row.answered else OTHER
        hour = row.at // 3_600_000
        if (hour, row.user) not in known:
            known[hour, row.user] = {OTHER, *find_models(hour, row.user)}
        models = known[hour, row.user]
        model = model if model in models or len(models) <= LEDGER_MODELS else OTHER
        models.add(model)
        alike.setdefault((hour, row.user, model, row.provider or "", row.key or ""), []).append(row)
    sums: dict[HourKey, Sums] = {}
    for key, ended in alike.items():
        sums[key] = [*figures_of(ended)]
        if all(row.cost is None for row in ended):
            sums[key][COST] = None
    return sums


def spent_sums(rows: Iterable[LedgerRow]) -> Spent:
    """What the rows add to the table `spent`: cost and tokens by user and window. Tokens read from a cache don't count,
    as in Anthropic's own limits: an agent reads all it has said before with each request."""
    of_days: dict[tuple[str, int], tuple[int, int]] = {}
    for row in rows:
        tokens = (row.input or 0) + (row.cache_write or 0) + (row.cache_write_long or 0) + (row.output or 0)
        if tokens or row.cost:
            day = row.user, row.at // 86_400_000
            cost_before, tokens_before = of_days.get(day, (0, 0))
            of_days[day] = cost_before + (row.cost or 0), tokens_before + tokens
    sums: Spent = {}
    for (user, number), spent in of_days.items():
        add_spent(sums, {(user, window): spent for window in windows(number * 86400)})
    return sums


def add_spent(sums: Spent, more: Spent) -> None:
    """Adds sums by user and window to others."""
    for key, (cost, tokens) in more.items():
        before = sums.get(key, (0, 0))
        sums[key] = before[0] + cost, before[1] + tokens


def plus(before: Optional[int], figure: Optional[int]) -> Optional[int]:
    """The sum of what is known; None if nothing is."""
    return figure if before is None else before + (figure or 0)


class Overspent(NamedTuple):
    """A budget that is spent: what its user is told, and when it begins anew, in seconds since 1970."""

    message: str
    ends: float


def windows(now: float) -> tuple[str, str]:
    """The day and the month in UTC, such as 2026-11-26 and 2026-11: what budgets are for."""
    date = (datetime.date(1970, 1, 1) + datetime.timedelta(days=now // 86400)).isoformat()
    return date, date[: len("2026-11")]


def window_end(window: str) -> float:
    """When a day or a month of windows() is over, in seconds since 1970."""
    if len(window) == len("2026-11"):
        first = datetime.date.fromisoformat(f"{window}-01")
        end = (first + datetime.timedelta(days=31)).replace(day=1)
    else:
        end = datetime.date.fromisoformat(window) + datetime.timedelta(days=1)
    return (end - datetime.date(1970, 1, 1)).days * 86400.0


def usd_text(nano: float) -> str:
    """So many 10^-9 USD for people: cents, and two more digits of what is less than a dollar."""
    return f"${nano / 1e9:,.2f}" if nano >= 1e9 or not nano else f"${nano / 1e9:.4f}"


def spent_over(user: User, spent: Callable[[str], tuple[int, int]], now: float) -> Optional[Overspent]:
    """The budget that keeps the user from starting another request; of several, the one that lasts longest. spent()
    tells what was spent in a window: 10^-9 USD, and tokens without those read from a cache."""
    day, month = windows(now)
    for window, usd, tokens in ((month, user.usd_per_month, 0), (day, user.usd_per_day, user.tokens_per_day)):
        if not usd and not tokens:
            continue
        (cost, count), end = spent(window), window_end(window)
        until = datetime.datetime.fromtimestamp(end, datetime.timezone.utc)
        rest = f"in {window} (UTC); the budget begins anew at {until:%Y-%m-%dT%H:%M:%SZ}"
        if usd and cost * PRICE_UNIT >= exact(usd) * 10**9:
            return Overspent(f"{user.name} has spent {usd_text(cost)} of {usd_text(usd * 1e9)} {rest}", end)
        if tokens and count >= tokens:
            return Overspent(f"{user.name} has used {count} of {tokens} tokens {rest}", end)
    return None


# ==== HTTP/1.1 ======================================================================================
#
# HTTP/1.1 messages as bytes, by RFC 9112 read strictly: what one neighbour may read differently from
# the other is refused. Lines end in CRLF and in nothing else; no name, length or chunk size is guessed.
# Heads are text in Latin-1, which maps every byte to one character and back; bodies stay bytes.

# One header field a line: no space before the colon, no folded line, no control byte but the tab. The expression
# backtracks by a single blank at most, so that a line is read in time proportional to its length; more blanks around
# the value are taken off afterwards. (^ follows LF only, and neither a bare LF nor a bare CR is part of a field, so as
# many matches as there are LFs prove that every line is one.)
FIELD_LINE = re.compile(rf"^({TOKEN.pattern}): ?([\t -~\x80-\xff]*)\r\n", re.MULTILINE)
REQUEST_LINE = re.compile(rf"({TOKEN.pattern}) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
STATUS_LINE = re.compile(r"HTTP/1\.([0-9]) ([1-9][0-9][0-9])(?: ([^\x00-\x08\x0a-\x1f\x7f]*))?")
# No name of a host is longer (RFC 1035 §2.3.4); each batch in a list is told of with that by which the relay was asked.
AUTHORITY = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=%-]{1,255}|\[[0-9A-Fa-f:.]{1,255}\])(?::[0-9]{0,5})?")
ABSOLUTE_FORM = r"(?i)^https?://[^/?]*/?"
# A percent-encoded letter, digit, hyphen, dot, underscore or tilde.
UNRESERVED_ESCAPED = r"%(2[DdEe]|3[0-9]|4[1-9A-Fa-f]|5[0-9AaFf]|6[1-9A-Fa-f]|7[0-9AaEe])"
UNSAFE_BYTES = bytes(range(0x21)) + b"\\\x7f"  # in a path
CONTENT_LENGTH = re.compile(r"[0-9]{1,15}")
LENGTHS = 10**15  # more than any of these; sys.maxsize may be less
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")
# Of a response, it may be padded with blanks, as RFC 2616 allowed: some old servers and balancers do that, and most
# clients read it.
PADDED_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")
CHUNK_SIZE_BEGUN = re.compile(rb"[0-9A-Fa-f]{1,15}([ \t]*;|[ \t]*\r?$)")
PAIR_NAME, PAIR_VALUE = operator.itemgetter(0), operator.itemgetter(1)  # of a header field

HOP_BY_HOP = FRAMING_HEADERS | {"proxy-connection", "proxy-authorization", "proxy-authenticate"}
# Under another spelling these would slip past a rule here and be understood by a server behind (a CGI-style server
# reads _ as -). Some providers take a key in `api-key` or `x-goog-api-key`: it must be the relay's, or none. What comes
# compressed doesn't tell what it used.
GUARDED_HEADERS = HOP_BY_HOP | {
    "host", "authorization", "x-api-key", "api-key", "x-goog-api-key", "x-monorelay-key", "cookie", "cookie2", "expect",
    "accept-encoding",
}  # fmt: skip


class Headers(dict[str, str]):
    """Header fields as they stood in a head: the first value of each by its name in lower case. Raises FramingError for
    a Connection that is too long."""

    __slots__ = ("connection", "names", "pairs")

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        self.names = list(map(str.lower, map(PAIR_NAME, pairs)))
        # From the last to the first, which so takes the place of others of its name.
        self.update(zip(reversed(self.names), map(PAIR_VALUE, reversed(pairs))))
        self.connection: Collection[str] = ()
        if "connection" in self:
            options = ",".join(self.all("connection"))
            if len(options) > CONNECTION_CHARACTERS:
                raise FramingError(f"Connection has more than {CONNECTION_CHARACTERS} characters")
            self.connection = frozenset(elements_of(options))

    def all(self, name: str) -> list[str]:
        """Every value of a field."""
        if len(self) == len(self.pairs):  # none stands there twice
            return [self[name]] if name in self else []
        return [pair[1] for known, pair in zip(self.names, self.pairs) if known == name]


class LongHeaders(Headers):
    """Those of a head with many fields, kept as text: one by one, a field of eight bytes would take 270, maybe for as
    long as a body takes to come. What isn't found in the text is made of it anew each time. Of the methods of a dict it
    has those that are used here."""

    __slots__ = ("_lines", "_names")

    def __init__(self, pairs: Pairs) -> None:
        names = map(str.lower, map(PAIR_NAME, pairs))
        self._lines = "\n".join(["", *map(":".join, zip(names, map(PAIR_VALUE, pairs))), ""])
        self._names = "\n".join(map(PAIR_NAME, pairs))  # as they were sent

    def __getattr__(self, name: str) -> Any:
        """One of its attributes `connection`, `names` and `pairs`."""
        if name == "connection":
            return Headers([(name, value) for value in self.all(name)]).connection
        if name == "names":
            return self._names.lower().split("\n")
        if name == "pairs":
            return list(zip(self._names.split("\n"), re.findall("\n[^:\n]*:(.*)", self._lines)))
        raise AttributeError(name)

    def __contains__(self, name: object) -> bool:
        return f"\n{name}:" in self._lines

    def __getitem__(self, name: str) -> str:
        return self.all(name)[0]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(self.names))

    def __len__(self) -> int:
        return len(self.keys())

    def keys(self) -> Any:
        return dict.fromkeys(self.names).keys()

    def get(self, name: str, default: Any = None) -> Any:
        return next(iter(self.all(name)), default)

    def all(self, name: str) -> list[str]:
        """Every value of a field."""
        found = re.finditer(f"\n{re.escape(name)}:", self._lines)
        return [self._lines[it.end() : self._lines.index("\n", it.end())] for it in found]


def to_keep(fields: Headers) -> Headers:
    """The fields of a head as they are kept."""
    is_long = len(fields.pairs) > KEPT_FIELDS or len(fields.connection) > KEPT_FIELDS
    return LongHeaders(fields.pairs) if is_long else fields


def elements_of(value: str) -> list[str]:
    """The comma-separated elements of a value, in lower case."""
    return list(filter(None, map(str.strip, value.lower().split(","))))


class RequestHead(NamedTuple):
    """The head of a request. `path` and `query` are as sent, percent-encoded; `query` has no `?`."""

    method: str
    path: str
    query: str
    version: int  # the minor version: 1 of HTTP/1.1
    fields: Headers
    body_length: Optional[int]  # None: chunked

    @property
    def keep_alive(self) -> bool:
        """Whether the client wants to use the connection again (RFC 9112 §9.3)."""
        return "close" not in self.fields.connection and (self.version >= 1 or "keep-alive" in self.fields.connection)


class ResponseHead(NamedTuple):
    """The head of an upstream's response."""

    status: int
    reason: str
    version: int
    fields: Headers


def head_length(data: bytes, seen: int = 0) -> int:
    """How many bytes at the start of `data` are a whole request head; 0 while it isn't whole. The first `seen`
    bytes were looked at before, and aren't looked at again.

    Raises MalformedRequest as soon as it can't become one: too long, or with a line end that isn't CRLF."""
    end = data.find(b"\r\n\r\n", seen - 3 if seen > 3 else 0)
    size = end + 4 if end >= 0 else len(data)
    if size > REQUEST_LINE_BYTES:
        line_end = data.find(b"\r\n", 0, REQUEST_LINE_BYTES + 2)
        if line_end < 0 or line_end > REQUEST_LINE_BYTES:
            raise MalformedRequest(f"the request line is longer than {REQUEST_LINE_BYTES} bytes", 414)
        if size > REQUEST_HEAD_BYTES:
            raise MalformedRequest(f"the request head is longer than {REQUEST_HEAD_BYTES} bytes", 431)
    if end >= 0:
        return size
    start = seen - data.startswith(b"\r", seen - 1) if seen else 0
    if data.count(b"\n", start) != data.count(b"\r\n", start):
        raise MalformedRequest("a line of the request head ends in LF alone")
    return 0


def parse_request_head(data: bytes) -> RequestHead:
    """The request head that `data` is, up to and with its empty line. Raises MalformedRequest."""
    line, _, block = data.decode("latin-1").partition("\r\n")
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise MalformedRequest("the request line must read METHOD TARGET HTTP/1.1, each separated by one space")
    method, target, major, minor = match.groups()
    if major != "1":
        raise MalformedRequest(f"HTTP/{major}.{minor} is not spoken here; use HTTP/1.1")
    if block.count("\n") > REQUEST_HEAD_FIELDS + 1:
        raise MalformedRequest(f"the request has more than {REQUEST_HEAD_FIELDS} header fields", 431)
    pairs = parse_fields(block[:-2])
    if pairs is None:
        raise MalformedRequest("a header line must read NAME: VALUE, without control bytes and ended by CRLF")
    try:
        fields, version = Headers(pairs), int(minor)
    except FramingError as error:
        raise MalformedRequest(str(error), 431) from None
    check_host(fields, version)
    check_spellings(fields)
    path, query = split_target(method, target)
    return RequestHead(method, path, query, version, to_keep(fields), request_body_length(fields, version))


def parse_fields(block: str) -> Optional[Pairs]:
    """Names and values of the fields in a block of lines that each end in CRLF; None unless all are well-formed."""
    pairs: Pairs = FIELD_LINE.findall(block)
    if block.count("\n") != len(pairs):
        return None
    if "\t" in block or " \r" in block or ":  " in block:
        pairs = [(name, value.strip(" \t")) for name, value in pairs]
    return pairs


def split_target(method: str, target: str) -> tuple[str, str]:
    """Path and query of a request target. The host of an absolute one is dropped: it chooses nothing. Raises
    MalformedRequest."""
    if not target.startswith("/"):
        target = re.sub(ABSOLUTE_FORM, "/", target)
        if method == "CONNECT" or target == "*":
            return target, ""
    if not target.startswith("/") or "#" in target:
        raise MalformedRequest("the request target must be a path that begins with / and has no fragment")
    path, _, query = target.partition("?")
    return path, query


def is_safe_path(path: str) -> bool:
    """Whether no server behind can take the path for another one, decoded once or twice."""
    once = unquote_to_bytes(path)
    for form in {path.encode("latin-1"), once, unquote_to_bytes(once)}:
        if b"//" in form or len(form.translate(None, UNSAFE_BYTES)) < len(form):
            return False
        # Some servers take what follows a semicolon for a parameter, and the segment for what is before it.
        if b"/." in b"/" + form and re.search(rb"(?:^|/)\.\.?(?:[;/]|\Z)", form):
            return False
    return True


def check_host(fields: Headers, version: int) -> None:
    """Raises MalformedRequest unless there is one well-formed Host, or none in HTTP/1.0 (RFC 9112 §3.2)."""
    count, host = fields.names.count("host"), fields.get("host", "")
    if count > 1 or (version >= 1 and not count):
        raise MalformedRequest("a request needs exactly one Host header")
    if host and not AUTHORITY.fullmatch(host):
        raise MalformedRequest("the Host header is malformed")


def check_spellings(fields: Headers) -> None:
    """Raises MalformedRequest for `content_length` and its like, which another server may read as a guarded name."""
    together = "".join(fields.names)
    if "_" not in together and "." not in together:
        return
    for name, spelling in zip(fields.names, as_hyphenated(fields.names)):
        if spelling != name and spelling in GUARDED_HEADERS:
            raise MalformedRequest(f"the header {name} could be mistaken for another; spell it with -")


def as_hyphenated(names: Sequence[str]) -> list[str]:
    """The names of header fields as a server may read them that takes _ or . for -."""
    return [name.replace("_", "-").replace(".", "-") for name in names]


def request_body_length(fields: Headers, version: int) -> Optional[int]:
    """The length of a request's body, None when it is chunked (RFC 9112 §6). Raises MalformedRequest."""
    if "transfer-encoding" in fields:
        if "content-length" in fields:
            raise MalformedRequest("Content-Length and Transfer-Encoding exclude each other")
        if [coding.lower() for coding in fields.all("transfer-encoding")] != ["chunked"] or version == 0:
            raise MalformedRequest("the only Transfer-Encoding is `chunked`, once, in HTTP/1.1")
        return None
    length = fields.get("content-length", "0")
    if fields.names.count("content-length") > 1 or not CONTENT_LENGTH.fullmatch(length):
        raise MalformedRequest("Content-Length must be given once, as a number")
    return int(length)


def parse_response_head(data: bytes) -> ResponseHead:
    """The head of a response, up to and with its empty line. Raises FramingError."""
    line, _, block = data.decode("latin-1").partition("\r\n")
    match = STATUS_LINE.fullmatch(line)
    if not match:
        raise FramingError("the status line is malformed")
    pairs = parse_fields(block[:-2]) if block.count("\n") <= RESPONSE_HEAD_FIELDS else None
    if pairs is None:
        raise FramingError("a header line is malformed, or there are too many")
    return ResponseHead(int(match[2]), match[3] or "", int(match[1]), to_keep(Headers(pairs)))


class LengthDecoder:
    """Reads a body of a known length. `finished` tells that it is whole, `rest` holds what follows it."""

    __slots__ = ("finished", "remaining", "rest")

    def __init__(self, length: int) -> None:
        self.remaining = length
        self.finished = length == 0
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """The part of `data` that belongs to the body."""
        if len(data) > self.remaining:
            data, self.rest = data[: self.remaining], data[self.remaining :]
        self.remaining -= len(data)
        self.finished = self.remaining == 0
        return data


class CloseDecoder:
    """Reads a body that ends with the connection; whether it is whole, nobody can know."""

    __slots__ = ("finished", "rest")

    def __init__(self) -> None:
        self.finished = False
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """All of it."""
        return data


class ChunkedDecoder:
    """Reads a chunked body (RFC 9112 §7.1). Extensions and trailer fields are checked and dropped."""

    __slots__ = ("_buffer", "_chunk", "_in_trailers", "_size", "_trailer_bytes", "finished", "rest")

    def __init__(self, trailer_bytes: int = TRAILER_BYTES, size: re.Pattern[bytes] = CHUNK_SIZE) -> None:
        self._buffer = b""  # framing that isn't whole yet
        self._chunk = 0  # bytes still to come of the current chunk, with the CRLF behind it
        self._in_trailers = False
        self._trailer_bytes = trailer_bytes  # how many more the trailer section may have
        self._size = size  # what the line before a chunk looks like
        self.finished = False
        self.rest = b""

    @property
    def announced(self) -> int:
        """How many bytes of content are still to come of the chunk that has begun."""
        return max(0, self._chunk - len(b"\r\n"))

    def feed(self, data: bytes) -> bytes:
        """The content in the next bytes of the body. Raises FramingError."""
        waits_for_line = self._buffer and not self._chunk
        if self._buffer:
            data, self._buffer = self._buffer + data, b""
        if self._in_trailers:
            self._feed_trailers(data)
        elif waits_for_line and b"\n" not in data:  # it mustn't be matched anew for each byte
            self._buffer = self._partial_size_line(data)
        else:
            return self._feed_chunks(data)
        return b""

    def _feed_chunks(self, data: bytes) -> bytes:
        """The content in the next bytes, which begin with framing or within a chunk."""
        size, position, end = len(data), 0, self._chunk
        match = None if end else self._size.match(data)
        length = int(match[1], 16) if match else 0
        if match and length and match.end() + length + 2 == size and data.endswith(b"\r\n"):
            return data[match.end() : -2]  # one whole chunk, as events mostly come
        parts = []
        while True:
            if end > size:
                parts.append(self._begun(data, position, end))
                break
            if end:
                if data[end - 2 : end] != b"\r\n":
                    raise FramingError("a chunk is not ended by CRLF")
                parts.append(data[position : end - 2])
            self._chunk = 0
            if end == size:
                break
            match = self._size.match(data, end)
            if not match:
                self._buffer = self._partial_size_line(data[end:])
                break
            length = int(match[1], 16)
            if not length:
                self._in_trailers = True
                self._feed_trailers(data[match.end() :])
                break
            position = match.end()
            end = position + length + 2
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _begun(self, data: bytes, position: int, end: int) -> bytes:
        """The content that has come of an unfinished chunk. Keeps its CRLF, or half of it, back."""
        content = data[position : end - 2]
        self._chunk = end - position - len(content)
        self._buffer = data[position + len(content) :]
        if self._buffer not in (b"", b"\r"):
            raise FramingError("a chunk is not ended by CRLF")
        return content

    def _partial_size_line(self, line: bytes) -> bytes:
        """The line, if more bytes can make it a size line. Raises FramingError."""
        if b"\n" in line or len(line) > CHUNK_LINE_BYTES or not CHUNK_SIZE_BEGUN.match(line):
            raise FramingError("a chunk size is malformed")
        return line

    def _feed_trailers(self, data: bytes) -> None:
        """Checks the trailer fields whose lines are whole, and looks for the empty line that ends them. Raises
        FramingError."""
        end = (b"\r\n" + data).find(b"\r\n\r\n")  # where the empty line stands
        size = end if end >= 0 else data.rfind(b"\n") + 1
        fields, rest = data[:size], data[size:]
        self._trailer_bytes -= size
        if self._trailer_bytes < (0 if end >= 0 else len(rest)) or parse_fields(fields.decode("latin-1")) is None:
            raise FramingError("the trailer section is malformed, or too long")
        if end >= 0:
            self.finished, self.rest = True, rest[len(b"\r\n") :]
        else:
            self._buffer = rest


Decoder = Union[LengthDecoder, CloseDecoder, ChunkedDecoder]


def response_decoder(head: ResponseHead, method: str) -> Decoder:
    """The decoder for the body of a response (RFC 9112 §6.3). Raises FramingError for contradictory framing."""
    fields = head.fields
    lengths = fields.all("content-length") if "content-length" in fields else []
    if lengths and not (CONTENT_LENGTH.fullmatch(lengths[0]) and lengths.count(lengths[0]) == len(lengths)):
        raise FramingError("the Content-Length is malformed")
    if method == "HEAD" or head.status in (204, 304):
        return LengthDecoder(0)
    if "transfer-encoding" in fields:
        codings = [coding.lower() for coding in fields.all("transfer-encoding")]
        if lengths or codings != ["chunked"] or head.version == 0:
            raise FramingError("the Transfer-Encoding is given twice, isn't chunked, or stands beside a Content-Length")
        return ChunkedDecoder(RESPONSE_HEAD_BYTES, PADDED_CHUNK_SIZE)
    return LengthDecoder(int(lengths[0])) if lengths else CloseDecoder()


def is_laborious(data: bytes) -> bool:
    """Whether so many short lines or chunks are among what has come that others should go first."""
    return len(data) > LABORIOUS_LINES and data.count(b"\n") > LABORIOUS_LINES


def decoded_at_once(data: bytes) -> int:
    """How many bytes of what has come are decoded at a time: as many as have LINES_AT_ONCE lines, on average."""
    return len(data) * LINES_AT_ONCE // max(LINES_AT_ONCE, data.count(b"\n"))


def head_bytes(first_line: str, fields: Iterable[tuple[str, str]]) -> bytes:
    """A head as it is sent, with its empty line."""
    return "\r\n".join([first_line, *map(": ".join, fields), "", ""]).encode("latin-1")


def reason_of(status: int) -> str:
    """The usual phrase for a status."""
    return http.client.responses.get(status, "Overloaded" if status == 529 else "Unknown")


def chunk(data: bytes) -> bytes:
    """The data as one chunk, nothing for no data (an empty chunk would end the body)."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


LAST_CHUNK = b"0\r\n\r\n"


# ==== Headers passed on =============================================================================
#
# All that a message says end to end is passed on as it came, in its order and with its repetitions; what is not:
# hop-by-hop fields, credentials, and what the relay itself says. Also here: CORS, retry-after, and what an error's
# status and body say: about the key, or about what was asked.

# What the relay tells of a response.
OWN_HEADERS = (
    "x-monorelay-provider", "x-monorelay-model", "x-monorelay-attempts", "x-monorelay-error", "x-monorelay-request-id",
    "x-monorelay-translated", "x-monorelay-dropped", "x-monorelay-estimated",
)  # fmt: skip
# By which a browser tells a server that a script of another origin calls (https://fetch.spec.whatwg.org/). That is
# between browser and relay, as the answer to it is: Anthropic has a 401 for it, whatever the key.
BROWSER_HEADERS = frozenset({
    "origin", "access-control-request-method", "access-control-request-headers",
    "sec-fetch-site", "sec-fetch-mode", "sec-fetch-dest", "sec-fetch-user", "sec-fetch-storage-access",
})  # fmt: skip
# What Cloudflare tells of a client where it is in front of the relay. A provider that is behind Cloudflare, too, as
# OpenAI and Anthropic are, would refuse the request for it with 403 ("error 1000",
# https://developers.cloudflare.com/support/troubleshooting/http-status-codes/cloudflare-1xxx-errors/error-1000/).
# `cf-aig-` is what clients tell Cloudflare's AI gateway.
CLOUDFLARE_HEADER = re.compile(r"cf-(?!aig-).*|cdn-loop|true-client-ip")
# What the relay sets itself, or keeps to itself.
REQUEST_HEADERS_KEPT_BACK = GUARDED_HEADERS | BROWSER_HEADERS
CORS_HEADERS = frozenset(
    {"access-control-allow-origin", "access-control-allow-credentials", "access-control-expose-headers"}
)
# A cookie of the provider is of no use to a client of the relay; its x-monorelay-* would be mistaken for ours.
RESPONSE_HEADERS_KEPT_BACK = HOP_BY_HOP | CORS_HEADERS | {"set-cookie", "set-cookie2", *OWN_HEADERS}
# What a browser takes for the word of the host that it asked, which is the relay's: that all there be HTTPS for a year
# (RFC 6797), where else it is served (RFC 7838), what to report and to forget. Other clients get it as it came.
HOST_HEADERS = frozenset(
    {"strict-transport-security", "alt-svc", "nel", "report-to", "reporting-endpoints", "clear-site-data"}
)
ORIGIN_CHARACTERS = 512  # of an origin: the name of a host has at most 253
# What scripts in a browser may read of a response, besides anthropic-ratelimit-*.
EXPOSED_HEADERS = ("request-id", "x-request-id", "retry-after", *OWN_HEADERS)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")  # of requests that are passed on
DEFAULT_ANTHROPIC_VERSION = "2023-06-01"  # for requests that name none


def end_to_end(fields: Headers, kept_back: frozenset[str]) -> Pairs:
    """The fields to pass on: neither kept back, nor declared hop-by-hop by Connection."""
    declared = fields.connection
    if not kept_back.issuperset(declared):
        kept_back = kept_back.union(declared)
    passed_on = map(operator.not_, map(kept_back.__contains__, fields.names))
    return list(itertools.compress(fields.pairs, passed_on))


def upstream_fields(
    head: RequestHead, provider: Provider, key: Optional[ProviderKey], body_length: Optional[int], recoded: bool
) -> Pairs:
    """The header fields for the provider: the client's, with the relay's credential in place of its own.

    `body_length` is None for a body whose length isn't known; a `recoded` body has lost its content-encoding."""
    kept_back = REQUEST_HEADERS_KEPT_BACK | {"content-encoding"} if recoded else REQUEST_HEADERS_KEPT_BACK
    if "cf-ray" in head.fields:
        kept_back = kept_back.union(filter(CLOUDFLARE_HEADER.fullmatch, head.fields.names))
    passed_on = end_to_end(head.fields, kept_back)
    fields = [("Host", provider.authority), *passed_on, ("Accept-Encoding", "identity")]
    version = "anthropic-version"
    if provider.format == "anthropic" and (version not in head.fields or version in head.fields.connection):
        fields.append((version, DEFAULT_ANTHROPIC_VERSION))
    if provider.client_keys and "x-monorelay-key" in head.fields:
        fields += [pair for pair in head.fields.pairs if pair[0].lower() in ("authorization", "x-api-key")]
    if key and provider.auth_header == "authorization":
        fields.append(("Authorization", f"Bearer {key.secret.reveal()}"))
    elif key:
        fields.append((provider.auth_header, key.secret.reveal()))
    for name, value in provider.headers:
        fields = [pair for pair in fields if pair[0].lower() != name.lower()]
        if value is not None:
            fields.append((name, value))
    if body_length is None:
        fields.append(("Transfer-Encoding", "chunked"))
    elif body_length or head.method in ("POST", "PUT", "PATCH"):
        fields.append(("Content-Length", str(body_length)))
    return fields


def shown_tokens(fields: Headers) -> list[str]:
    """The tokens that a request shows, wherever they stand."""
    if "x-monorelay-key" in fields:  # the others are the client's credential for a provider
        return fields.all("x-monorelay-key")
    credentials = map(str.partition, fields.all("authorization"), itertools.repeat(" "))
    bearers = [token.strip() for scheme, _, token in credentials if scheme.lower() == "bearer"]
    return bearers + fields.all("x-api-key")


def asks_for_websocket(fields: Headers) -> bool:
    """Whether a request asks for a WebSocket. Of one that came through nginx only the key is left, not the Upgrade."""
    return "sec-websocket-key" in fields or "websocket" in fields.get("upgrade", "").lower()


def media_type(fields: Headers) -> str:
    """The media type of Content-Type, in lower case and without parameters (RFC 9110 §8.3.1)."""
    return fields.get("content-type", "").partition(";")[0].strip().lower()


def header_text(value: str) -> str:
    """Text from outside made fit for a header value: what isn't printable ASCII is percent-encoded."""
    is_fit = value.isascii() and value.isprintable()
    return value if is_fit else quote(value, safe=" !#$&'()*+,/:;=?@[]%", errors="replace")


def retry_after_seconds(value: str, now: float) -> Optional[float]:
    """What `retry-after` asks for: seconds, fractions too, or an HTTP date (RFC 9110 §10.2.3), compared
    with `now` (seconds since 1970); at most an hour. None when it is absent, malformed or in the past."""
    if re.fullmatch(r"[0-9]{1,18}(\.[0-9]{1,9})?", value):
        seconds = float(value)
    else:
        try:
            date = email.utils.parsedate_to_datetime(value)
            # Without a zone (asctime's form), or with -0000 (Python's formatdate()), the date is one of UTC.
            seconds = date.replace(tzinfo=date.tzinfo or datetime.timezone.utc).timestamp() - now
        except (TypeError, ValueError, IndexError, OverflowError):
            return None
    return min(seconds, RETRY_AFTER_LIMIT_SECONDS) if seconds >= 0 else None


# Responses after which another key or target is tried; 400, 404, 413 and 422 are about the request, and would be the
# same anywhere. Cloudflare tells by 520 to 524 and 530 that the server behind it failed.
RETRIED_STATUSES = frozenset({401, 402, 403, 429, 500, 502, 503, 504, *range(520, 525), 529, 530})
# Of several failures the client is told the last one that a later try may cure, rather than one of these.
LASTING_STATUSES = frozenset({401, 402, 403})
# What a 400, or Fireworks' 412, says that isn't about the request, by the status that it should have had: Gemini and
# xAI tell so of a wrong key; Anthropic of an account without credit, at its monthly limit or shut, Alibaba, Groq,
# OpenAI and LiteLLM of the like; Gemini and Bedrock of a region, OpenAI of who isn't verified. A code is the error's
# own, and a message whole: where one quotes what a client has sent, a colon or more stands before or behind.
MEANT_STATUSES = {
    401: re.compile(
        rb'"reason" ?: ?"API_KEY_INVALID"'
        rb'|"error" ?: ?"Incorrect API key provided: [^" \\]*\. You can obtain an API key from https://console\.x\.ai\."'
    ),
    402: re.compile(
        rb'(?i)\A\s*\{(?:\s*"error"\s*:\s*\{)?[^][{}]*"(?:code|type)" ?: ?'
        rb'"(?:arrearage|billing_hard_limit_reached|organization_restricted|budget_exceeded)"'
        rb'|"message" ?: ?"(?:your credit balance is too low[^":\\]*|this organization has been disabled\.'
        rb"|you have reached your specified (?:workspace )?api usage limits\. you will regain access on [-0-9]+ at "
        rb'[0-9:]+ utc\.|account [^" \\]+ is suspended, possibly due to [^":\\]*https://fireworks\.ai/[^":\\]*)"'
    ),
    403: re.compile(
        rb'"message" ?: ?"(?:User location is not supported for the API use|Access to Anthropic models is not allowed'
        rb'|Your organization must be verified to stream this model\. Please go to: )(?:https://|[^":\\])*"'
    ),
}
# OpenAI's 400 and 404, and Anthropic's 404 of threads and files, where a request goes on with what another account
# keeps, or has encrypted.
KEPT_ELSEWHERE = re.compile(
    rb'"(?:error_)?code" ?: ?"(?:previous_response_not_found|invalid_encrypted_content|thread_not_found)"'
    rb'|"message" ?: ?"(?:File not found: file_|(?:Container|Conversation|Item|Prompt) with id \'[a-z]{1,20}_)'
)
# Whether these are about the key or about what was asked, only their bodies tell.
TELLING_STATUSES = frozenset({400, 401, 402, 403, 404, 412, 429})
# What an error says, or is called, that is about what was asked: Anthropic of a tier's context, OpenRouter of what the
# credit left is too little for, OpenAI of a request alone over its limit of tokens a minute, and of its flex tier that
# has no room, OpenRouter and xAI of moderation.
ABOUT_REQUEST = re.compile(
    rb"""(?x) long\ context\ requests | can\ only\ afford\ [1-9] | [Pp]rompt\ tokens\ limit\ exceeded
    | [Rr]equest\ too\ large\ for | [Rr]esource[ _][Uu]navailable | input\ was\ flagged | usage\ guidelines
    | context_length_exceeded | content_policy | content_filter"""
)
# OpenAI's 401 for a restricted key that may use other paths, such as chats and not responses.
LACKS_SCOPE = re.compile(rb"(?i)missing scopes?\b")
# How vLLM, Responses and others tell in a stream, whose own status was 200, that a request was a bad one.
CODE_ABOUT_REQUEST = re.compile(
    rb'"(?:code|status|status_code)" ?: ?"?(?:400|404|413|422|invalid_prompt|(?:bio|cyber)_policy'
    rb'|misalignment_policy_violation|[a-z0-9_]{0,40}image[a-z0-9_]{0,40})[",} ]'
)


def meant_status(status: int, told: bytes) -> int:
    """The status that an error should have had, by what its body tells."""
    if status not in (400, 412):
        return status
    return next((meant for meant, says in MEANT_STATUSES.items() if says.search(told)), status)


def is_about_request(status: int, told: bytes) -> bool:
    """Whether an error says nothing about the provider and its key, but about what was asked. The status is 0 where
    only its type and code tell: with a 401 or 403, `invalid_request` may mean the key."""
    if status == 401:
        return b"CORS requests" in told  # Anthropic's word for a browser's
    is_named = status in (0, 402, 403, 429) and ABOUT_REQUEST.search(told)
    if not status and (b"invalid_request" in told or CODE_ABOUT_REQUEST.search(told)):
        return True
    return bool(is_named) or status in (400, 404, 413, 422, 501)  # llama.cpp's 501 is about a path


def is_about_fast_mode(status: int, fields: Headers) -> bool:
    """Whether an error says that Anthropic's fast mode has no room, whose limits are apart from the model's
    (https://platform.claude.com/docs/en/build-with-claude/fast-mode)."""
    left = [fields.get(f"anthropic-fast-{kind}-tokens-remaining") for kind in ("input", "output")]
    return "0" in left or (status == 529 and any(left))


def cors_fields(origins: Sequence[str], request: Headers, response: Iterable[tuple[str, str]] = ()) -> Pairs:
    """What lets a browser's script read a response (https://fetch.spec.whatwg.org/#http-cors-protocol);
    nothing unless the origin is one of the allowed ones."""
    origin = request.get("origin", "") if origins else ""
    if not 0 < len(origin) <= ORIGIN_CHARACTERS or not matches_any(origin, origins):
        return []
    exposed = [*EXPOSED_HEADERS, *(name for name, _ in response if name.lower().startswith("anthropic-ratelimit-"))]
    return [
        ("access-control-allow-origin", "*" if "*" in origins else origin),
        ("access-control-expose-headers", ", ".join(exposed)),
        ("vary", "Origin"),
    ]


def preflight_fields(request: Headers) -> Pairs:
    """The fields of a response to a preflight: all methods and the headers asked for, for a day."""
    headers = request.get("access-control-request-headers") or "*"
    return [
        ("access-control-allow-methods", ", ".join(METHODS)),
        ("access-control-allow-headers", headers[:LONG_HEAD_BYTES]),  # what is longer would only be held
        ("access-control-max-age", "86400"),
    ]


# ==== JSON bodies ================================================================================
#
# A JSON body is passed on byte for byte; only the value of the top-level "model" may change. To know that it is
# one object, and what its model is, `json` reads a body at once, where that is a matter of milliseconds. A longer one
# is walked token by token, in steps between which others are served, at a fifth of the speed. The walk builds
# nothing: it notes where the model stands, and a few short strings. Either reads what RFC 8259 allows and nothing
# else, with one exception: long stretches of a string without an escape (images, documents) are passed over unread.
# They prove nothing, and would cost more than all the rest.

JSON_BLANKS = " \t\n\r"
JSON_AT_ONCE_BYTES = 512 * 1024  # `json` takes up to 8 ms for as much, if that isn't
DENSE_JSON_BYTES = 256 * 1024  # a longer body that has
DENSE_JSON_MARKS = 40_000  # commas and opening brackets; for a shorter one it takes 8 ms, too, whatever that has
SPLICED_AT_ONCE_BYTES = 16 * 1024  # and model_span() up to 5
AT_ONCE_BYTES = 4 * 1024  # a longer body waits for the turn of others before it is read: 0.4 ms at worst
LONG_STRING_BYTES = 4096
WALK_STEPS = 500  # tokens at a time; of a piece of 64 KiB that takes 3 ms at the most
WALK_PARTS = 50  # of long strings at a time: of one that is all escapes, each takes up to 0.2 ms
# What stands before a value: { or a comma, the name, a colon.
MEMBER = re.compile(r'[ \t\n\r]*[{,][ \t\n\r]*"([^"\\]*(?:\\.[^"\\]*)*)"[ \t\n\r]*:[ \t\n\r]*')
# Nobody needs the numbers: len() takes any digits in no time, where float() takes up to a microsecond and int() refuses
# over 4,300. Objects come as tuples of pairs, which keep what is given twice and can't be mistaken for lists.
BODY_DECODER = json.JSONDecoder(parse_int=len, parse_float=len, parse_constant=refuse_constant, object_pairs_hook=tuple)

# A token of the walk, with blanks behind it; its group tells its kind. A string is a token when it is short, plain
# and ASCII, else its first quote is one. A token is looked for within LONG_STRING_BYTES.
JSON_TOKEN = re.compile(
    rb'(?:("[^"\\\x00-\x1f\x80-\xff]*")|(")|(,)|(:)|(\[)|({)|(\])|(})'
    rb"|(-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null))[ \t\n\r]*"
)
STRING, QUOTE, COMMA, COLON, OPEN_LIST, OPEN_OBJECT, CLOSE_LIST, CLOSE_OBJECT, SCALAR = range(1, 10)
STRING_PART = re.compile(rb'[^"\\\x00-\x1f]*(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*)*')
BLANKS = re.compile(rb"[ \t\n\r]*")
# What each kind of token adds to the count of values: a name was counted as a string, and isn't one of them.
VALUES_OF_KIND = (0, 1, 1, 0, -1, 1, 1, 0, 0, 1)
# Which tokens may come where, and what comes next. Where a list or an object ends, that is told by what it stands in.
ITEM = {kind: "after item" for kind in (STRING, QUOTE, SCALAR)}
OPENED = {OPEN_LIST: "first item", OPEN_OBJECT: "first name"}
GRAMMAR: Mapping[str, Mapping[int, str]] = {
    "start": {OPEN_OBJECT: "first name"},
    "first name": {STRING: "colon", QUOTE: "colon", CLOSE_OBJECT: "end"},
    "name": {STRING: "colon", QUOTE: "colon"},
    "colon": {COLON: "value"},
    "value": {**dict.fromkeys((STRING, QUOTE, SCALAR), "after member"), **OPENED},
    "after member": {COMMA: "name", CLOSE_OBJECT: "end"},
    "first item": {**ITEM, **OPENED, CLOSE_LIST: "end"},
    "item": {**ITEM, **OPENED},
    "after item": {COMMA: "item", CLOSE_LIST: "end"},
    "end": {},
}


class BodyFacts(NamedTuple):
    """The facts that routing needs of a JSON body."""

    model: str
    # Whether another top-level name may be taken for `model`, or names another one; or, of those who may use some
    # models only, whether a tool has one of its own.
    lookalike: bool
    session: str  # the `user_id` in `metadata`, else `prompt_cache_key`, or empty
    span: Optional[tuple[int, int]] = None  # where the value of `model` stands, if that is known


def facts_of(
    models: Sequence[tuple[str, Any]], tool_has_model: bool, session: str, span: Optional[tuple[int, int]] = None
) -> BodyFacts:
    """The facts of a body with these members whose names may be taken for `model`. Raises BadRequest unless exactly one
    has that very name, and names a model."""
    values = [value for name, value in models if name == "model"]
    if not values:
        raise BadRequest("model: Field required", "no_model")
    if len(values) > 1:
        raise BadRequest("model: given more than once")
    return BodyFacts(model_name(values[0]), tool_has_model or len(models) > 1, session, span)


def model_name(value: Any) -> str:
    """The value of `model`. Raises BadRequest unless it can name one."""
    if not isinstance(value, str) or not value:
        raise BadRequest("model: Input should be a valid string that isn't empty", "no_model")
    if len(value) > MODEL_CHARACTERS:
        raise BadRequest(f"model: Input should have at most {MODEL_CHARACTERS} characters")
    return value


# `model`, and what gateways take beside it or in its place.
MODEL_NAMES = frozenset({
    "model", "models", "model_name", "model_id", "modelid", "model_list", "fallback_model", "fallback_models",
    "fallbacks", "context_window_fallbacks", "context_window_fallback_dict", "content_policy_fallbacks", "user_config",
    "router_settings_override", "engine", "deployment", "deployment_id", "preset", "prompt_id", "plugins",
    "provideroptions", "api_base", "base_url", "extra_body", "tensorzero::variant_name", "tensorzero::extra_body",
    "tensorzero::internal_dynamic_variant_config", "answering_model", "reasoning_model", "draft_model", "load_balancer",
    "orq", "model_routing_config", "nim-llm-router", "lora", "lora_name", "lora_path", "adapters", "adapter_path",
    "agent", "agent_reference", "safety_model", "extra_params", "router", "load_balance_group", "loadbalance_models",
    "respan_params", "keywordsai_params",
})  # fmt: skip
OTHER_MODEL_NAMES = MODEL_NAMES - {"model"}


def is_model_name(name: str) -> bool:
    """Whether a name is `model` for servers that don't heed its case or blanks around it, or end it at a NUL; or one
    of the others by which some are told what may be used. One too long to be read is taken for that, too."""
    return len(name) > MODEL_CHARACTERS or name.casefold().partition("\0")[0].strip() in MODEL_NAMES


def name_another_model(names: Collection[str]) -> bool:
    """Whether one of the names, which all differ, may be taken for `model`, or names another one."""
    together = "".join(names)
    if together.isascii() and together.islower() and together.isidentifier():  # as mostly; quick to look at
        return not OTHER_MODEL_NAMES.isdisjoint(names)
    return any(is_model_name(name) for name in names if name != "model")


# OpenRouter's own tools, but for those that ask no model.
OPENROUTER_TOOL = re.compile(r"openrouter:(?!(?:web_search|web_fetch|datetime)\Z)")


def tells_of_model(name: str, value: str) -> bool:
    """Whether a tool with this member works by a model of its own, which it names or chooses."""
    return is_model_name(name) or (name.casefold() == "type" and OPENROUTER_TOOL.match(value) is not None)


# Where objects stand that may name a model of their own; `*` is each item of a list. These are tools, which OpenAI
# takes in the input, too, and Anthropic in a turn and in what is left of turns that were compacted; who draws an SVG;
# and the parts of Groq's compound.
TOOL_PLACES = frozenset(
    tuple(place.split())
    for place in (
        "tools *", "input * tools *", "messages * content * tool definition",
        "messages * content * tool_changes * tool definition", "svg", "tools * svg", "input * tools * svg",
        "compound_custom models",
    )
)  # fmt: skip
# Those places and all that lead to them, and which steps go on from each: from the nearest to the farthest.
WAYS_TO_TOOLS = frozenset(place[:end] for place in TOOL_PLACES for end in range(1, len(place) + 1))
STEPS_TO_TOOLS = {
    way: frozenset(longer[-1] for longer in WAYS_TO_TOOLS if longer[:-1] == way)
    for way in sorted({longer[:-1] for longer in WAYS_TO_TOOLS}, key=len)
}


def tools_of(document: Any) -> Iterator[tuple[Any, ...]]:
    """The objects at TOOL_PLACES in a body, as BODY_DECODER has them."""
    found: dict[tuple[str, ...], list[Any]] = {(): [document]}
    for way, steps in STEPS_TO_TOOLS.items():
        values = found.get(way)
        if not values:
            continue
        if "*" in steps:
            item_way = (*way, "*")
            found[item_way] = [item for value in values if isinstance(value, list) for item in value]
            continue
        members = list(itertools.chain.from_iterable(value for value in values if isinstance(value, tuple)))
        names = [name for name in set(map(PAIR_NAME, members)) if name.casefold() in steps]
        inner = {name: found.setdefault((*way, name.casefold()), []) for name in names}
        for name, member in members if inner else ():
            if name in inner:
                inner[name].append(member)
    return (tool for place in TOOL_PLACES for tool in found.get(place, ()) if isinstance(tool, tuple))


def have_model(tools: Iterable[tuple[Any, ...]]) -> bool:
    """Whether one of the tools works by a model of its own."""
    members = list(itertools.chain.from_iterable(tools))
    # Each name is looked at once, and each pair: most tools have the same names and types.
    names = {name for name in set(map(PAIR_NAME, members)) if is_model_name(name) or name.casefold() == "type"}
    told = {member for member in members if member[0] in names and isinstance(member[1], str)} if names else ()
    return any(itertools.starmap(tells_of_model, told))


def read_at_once(body: bytes, restricted: bool = True) -> BodyFacts:
    """The facts of a short JSON body; `restricted`: of one whose sender may use some models only. Raises BadRequest."""
    try:
        text = body.decode("utf-8").rstrip(JSON_BLANKS)
        document, end = BODY_DECODER.raw_decode(text, len(text) - len(text.lstrip(JSON_BLANKS)))
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        if body.startswith(codecs.BOM_UTF8):
            raise not_json("it begins with a byte order mark") from None
        raise not_json(f"line {error.lineno} column {error.colno}: {error.msg}") from None
    except (UnicodeDecodeError, RecursionError):
        raise not_json("it is not in UTF-8, or nested too deeply") from None
    except ValueError as error:
        raise not_json(str(error)) from None
    if not isinstance(document, tuple):
        raise BadRequest("the body must be a JSON object", "not_json")
    members = dict(document)
    metadata = members.get("metadata")
    user_id = dict(metadata).get("user_id") if isinstance(metadata, tuple) else ""
    session = next((name for name in (user_id, members.get("prompt_cache_key")) if name and isinstance(name, str)), "")
    if not restricted and "model" in members and len(members) == len(document):
        return BodyFacts(model_name(members["model"]), name_another_model(members), session)
    models = [member for member in document if is_model_name(member[0])]
    return facts_of(models, have_model(tools_of(document)), session)


def not_json(problem: str) -> BadRequest:
    """The error for a body that can't be read."""
    return BadRequest(f"the body is not valid JSON: {problem}", "not_json")


def short_integer(digits: str) -> int:
    """The integer. Raises ValueError for a long one, which takes time in proportion to the square of its length."""
    if len(digits) > INTEGER_DIGITS:
        raise ValueError("an integer is too long")
    return int(digits)


class JsonWalk:
    """Walks a JSON object piece by piece: feed() it, then go_on() while it is `behind`; after finish(), once it isn't
    behind any more, the facts are there."""

    def __init__(self, restricted: bool = True) -> None:
        self.behind = False  # whether it has not yet walked over what it was fed with
        self._last = False  # whether nothing follows
        self._body = b""  # what has come and isn't done with
        self._at = 0  # how much of that is
        self._before = 0  # how many bytes were before it
        self._state = "start"
        self.values = 0
        self._around = bytearray()  # of each list and object that is open: whether it stands in an object
        self._decoder: Optional[codecs.IncrementalDecoder] = None  # of the long string that is being read
        self._within_character = False  # whether what was passed over of it may have ended within a character
        self._names = ["", ""]  # the last name in the outer object, and in an object within it
        # The place of what is open, as far as it may lead to a tool, and how many lists and objects within don't: where
        # the sender may use all models, nobody asks for that, and the outer object is taken for one of these.
        self._way: tuple[str, ...] = ()
        self._astray = 0 if restricted else 1
        self._name = ""  # the last one on the way
        self._models: list[tuple[str, Any]] = []
        self.span = 0, 0  # where the model stands, once that has been seen
        self._has_model = False  # whether a tool has one
        self._user_id = self._cache_key = ""

    @property
    def finished(self) -> bool:
        """Whether it has walked over all of the body."""
        return self._last and not self.behind

    @property
    def facts(self) -> BodyFacts:
        """The facts of the body. Raises BadRequest."""
        return facts_of(self._models, self._has_model, self._user_id or self._cache_key, self.span)

    def feed(self, piece: bytes) -> None:
        """Takes the next piece."""
        self._before += self._at
        self._body, self._at = self._body[self._at :] + piece, 0
        self.behind = True

    def finish(self) -> None:
        """Takes note that nothing follows."""
        self._last = self.behind = True

    def go_on(self) -> None:
        """Takes some more tokens, or parts of long strings. Raises BadRequest."""
        body, state, at = self._body, self._state, self._at
        # A token begins where all of it must have come.
        limit = len(body) if self._last else len(body) - LONG_STRING_BYTES
        parts = 0
        for _ in range(WALK_STEPS):
            if self._decoder:
                begun, at = at, self._read_string(self._decoder, at)
                parts, self.behind = parts + 1, at > begun
                if not self.behind or parts == WALK_PARTS:
                    break
                continue
            if at >= limit:
                self.behind = False
                break
            match = JSON_TOKEN.match(body, at, at + LONG_STRING_BYTES)
            if not match:
                at = self._pass_blanks(at)
                continue
            kind = match.lastindex or 0
            following = GRAMMAR[state].get(kind)
            start, at, end = at, match.end(), match.end(kind)
            if not following or (kind == SCALAR and end - start == LONG_STRING_BYTES):
                raise self._malformed(start)
            self.values += VALUES_OF_KIND[kind]
            if kind == QUOTE:
                at = end = self._begin_string(end)
            if kind <= QUOTE and not self._astray:
                self._notice_tool(state, start, end)
            if len(self._around) <= 2:
                self._notice(kind, state, start, end)
            state = self._nest(kind, state) if OPEN_LIST <= kind <= CLOSE_OBJECT else following
        self._state, self._at = state, at
        self._check()

    def _check(self) -> None:
        """Raises BadRequest for too many values, or an end that comes too early."""
        if self.values > JSON_VALUES:
            raise BadRequest(f"the body has more than {JSON_VALUES} values")
        if self.finished and (self._decoder or self._state != "end"):
            raise not_json("it is cut off")

    def _nest(self, kind: int, state: str) -> str:
        """The state after a token that opens or closes a list or an object."""
        if kind in OPENED:
            if self._around:
                self._go_in(self._name if state == "value" else "*")
            self._around.append(state == "value")
            return OPENED[kind]
        in_object = self._around.pop()
        if not self._around:
            return "end"
        if self._astray:
            self._astray -= 1
        else:
            self._way = self._way[:-1]
        return "after member" if in_object else "after item"

    def _go_in(self, step: str) -> None:
        """Notes what leads to a list or an object within another."""
        if not self._astray and (*self._way, step) in WAYS_TO_TOOLS:
            self._way = (*self._way, step)
        else:
            self._astray += 1

    def _pass_blanks(self, at: int) -> int:
        """Where the next token may begin."""
        end = matched(BLANKS, self._body, at)
        if end == at:
            raise self._malformed(at)
        return end

    def _begin_string(self, at: int) -> int:
        """Reads a string whose content begins here to its end, or begins to when it is long."""
        end = matched(STRING_PART, self._body, at)
        self._decoder = UTF_8()
        return self._read_part(self._decoder, at, end) if self._body.startswith(b'"', end) else at

    def _read_string(self, decoder: codecs.IncrementalDecoder, at: int) -> int:
        """Reads the next part of a long string, or passes over it where it is long and has no escape. Where that ends
        is where it began when more has to come first."""
        body = self._body
        quote = body.find(b'"', at)
        stretch = quote if quote >= 0 else len(body)
        if stretch - at > LONG_STRING_BYTES:
            escape = body.find(b"\\", at, stretch)
            stretch = escape if escape >= 0 else stretch
            if stretch - at > LONG_STRING_BYTES:
                decoder.reset()
                self._within_character = True
                return stretch
        end = matched(STRING_PART, body, at)
        if end == at and not body.startswith(b'"', at) and len(body) - at >= len(rb"\u0000"):
            raise self._malformed(at)
        return self._read_part(decoder, at, end)

    def _read_part(self, decoder: codecs.IncrementalDecoder, at: int, end: int) -> int:
        """Reads a part of a string, which must be UTF-8; where it ends, with the quote behind it."""
        ends = self._body.startswith(b'"', end)
        part = self._body[at:end]
        if self._within_character:
            part = part.lstrip(CONTINUATION_BYTES)
            self._within_character = not (part or ends)
        try:
            decoder.decode(part, ends)
        except UnicodeDecodeError:
            raise not_json("it is not in UTF-8") from None
        if ends:
            self._decoder = None
        return end + ends

    def _notice(self, kind: int, state: str, start: int, end: int) -> None:
        """Looks at a token of the outer object, or of an object that it holds."""
        depth, is_string = len(self._around), kind in (STRING, QUOTE)
        if GRAMMAR[state].get(kind) == "colon":
            self._names[depth - 1] = self._text(start, end)
            if depth == 1:
                self._names[1] = ""
                if self._names[0] == "metadata":
                    self._user_id = ""  # the last one counts
        elif state == "value" and depth == 1 and is_model_name(self._names[0]):
            self._notice_model(self._names[0], start, end, is_string)
        elif state == "value" and depth == 1 and self._names[0] == "prompt_cache_key":
            self._cache_key = self._text(start, end) if is_string else ""
        elif state == "value" and self._names == ["metadata", "user_id"]:
            self._user_id = self._text(start, end) if is_string else ""

    def _notice_tool(self, state: str, start: int, end: int) -> None:
        """Looks at a string on the way to a tool, which has a model of its own when that is the name before it."""
        if state in ("first name", "name"):
            self._name = self._text(start, end).casefold()
        elif state == "value" and self._way in TOOL_PLACES:
            self._has_model |= tells_of_model(self._name, self._text(start, end))

    def _notice_model(self, name: str, start: int, end: int, is_string: bool) -> None:
        """Notes the member called `model`, and of those that may be taken for it the first. Raises BadRequest for a
        second one of that very name."""
        if name == "model":
            if self.span[1]:
                raise BadRequest("model: given more than once")
            self.span = self._before + start, self._before + end
            self._models.append((name, self._text(start, end) if is_string else None))
        elif not self._models or self._models[-1][0] == "model":
            self._models.append((name, None))

    def _text(self, start: int, end: int) -> str:
        """The string that stands there; of a long one its beginning, unread."""
        longest = 6 * MODEL_CHARACTERS
        if self._decoder or end - start > longest:
            return self._body[start : start + longest].decode("latin-1")
        string = self._body[start:end]
        return str(json.loads(string)) if b"\\" in string or not string.isascii() else string[1:-1].decode("ascii")

    def _malformed(self, at: int) -> BadRequest:
        return not_json(f"unexpected byte at {self._before + at}" if at < len(self._body) else "it is cut off")


UTF_8 = codecs.getincrementaldecoder("utf-8")
CONTINUATION_BYTES = bytes(range(0x80, 0xC0))  # of UTF-8


def matched(pattern: re.Pattern[bytes], body: bytes, at: int) -> int:
    """Where a match that begins here ends, within LONG_STRING_BYTES."""
    match = pattern.match(body, at, at + LONG_STRING_BYTES)
    return match.end() if match else at


class ReadBody:
    """A request body that is read for its model: a short one at once when it is whole, a long one as it comes. Behind
    add(), finish() and locate_model() it wants go_on() for as long as it is `behind`. It is held until a response has
    begun."""

    __slots__ = ("_restricted", "_walk", "behind", "content", "facts", "problem", "sent", "size", "values")
    finished, is_spent = True, False  # as it is passed on: it is whole by then, and can be sent again, see RequestBody

    def __init__(self, restricted: bool = True) -> None:
        self._restricted = restricted  # whether its sender may use some models only
        self.content: list[bytes] = []  # in pieces, without its content-encoding
        self.sent = self.content  # as the client sent it
        self.size = 0  # of the content
        self.values = 0  # in it, if it was walked; one that was read at once has few
        self.facts: Optional[BodyFacts] = None  # of one that is JSON with a model
        self.problem = ("", "")  # why it isn't that, and the code of the error
        self.behind = False  # whether there is work to do that takes long
        self._walk: Optional[JsonWalk] = None

    def add(self, piece: bytes) -> None:
        """Takes the next piece of the content."""
        append_piece(self.content, piece)
        self.size += len(piece)
        if self._walk:
            self._walk.feed(piece)
            self.go_on()
        elif self.size > JSON_AT_ONCE_BYTES and not self.problem[0]:
            self._begin_walk()

    def finish(self) -> None:
        """Takes note that the content is whole."""
        if not self._walk and not self.problem[0] and self._is_dense():
            self._begin_walk()
        if self._walk or self.problem[0]:
            self._finish_walk()
            return
        try:
            self.facts = read_at_once(b"".join(self.content), self._restricted)
        except BadRequest as error:
            self.problem = error.message, error.code

    def locate_model(self) -> None:
        """Finds out where the model stands in a body that was read at once."""
        if self.facts and not self.facts.span:
            if self.size <= SPLICED_AT_ONCE_BYTES:
                self.facts = self.facts._replace(span=model_span(b"".join(self.content)))
            else:
                self._begin_walk()
                self._finish_walk()

    def go_on(self) -> None:
        """Does a part of the work."""
        walk = self._walk
        try:
            if walk:
                walk.go_on()
                self.behind = walk.behind
                if self.facts and walk.span[1]:  # it has been read before, and only that was missing
                    self.facts, self.behind, self._walk = self.facts._replace(span=walk.span), False, None
                elif walk.finished:
                    self.facts, self.values, self._walk = walk.facts, walk.values, None
        except BadRequest as error:
            self.problem, self.behind, self._walk = (error.message, error.code), False, None

    def with_model(self, model: str, decoded: bool = False) -> tuple[list[bytes], bool]:
        """The body that asks for this model, in pieces, and whether it has lost its content-encoding: it does where it
        asks for another one than the client, whose place must be known then, or is to be `decoded`."""
        if self.facts is None or self.facts.model == model:
            return (self.content, self.sent is not self.content) if decoded else (self.sent, False)
        assert self.facts.span
        return splice_model(self.content, self.facts.span, model), self.sent is not self.content

    @property
    def most_values(self) -> int:
        """How many values it has; of one that was read at once no fewer, up to TRANSLATED_LATE_VALUES."""
        return self.values or min(self._marks(), TRANSLATED_LATE_VALUES)

    def drop(self) -> None:
        """Lets go of the bytes: nothing will be sent again."""
        self.sent = self.content = []

    def drop_decoded(self) -> int:
        """Lets go of what was decompressed, where it is sent as it came; how many bytes that were."""
        if self.sent is self.content:
            return 0
        self.content = []
        return self.size

    def _is_dense(self) -> bool:
        """Whether it may have so many values that `json` would take too long."""
        return self.size > DENSE_JSON_BYTES and self._marks() > DENSE_JSON_MARKS

    def _marks(self) -> int:
        """How many commas and opening brackets it has, in strings, too."""
        return self.size - sum(len(piece.translate(None, b",[{")) for piece in self.content)

    def _begin_walk(self) -> None:
        self._walk = JsonWalk(self._restricted)
        self._walk.feed(b"".join(self.content))
        self.go_on()

    def _finish_walk(self) -> None:
        if self._walk:
            self._walk.finish()
            self.go_on()


def append_piece(pieces: list[bytes], piece: bytes) -> None:
    """Appends a piece of a body. Small ones become one: each has a cost of its own, in memory and when it is sent."""
    if pieces and len(pieces[-1]) + len(piece) <= RECEIVE_BYTES:
        pieces[-1] += piece
    else:
        pieces.append(piece)


def splice_model(pieces: Sequence[bytes], span: tuple[int, int], name: str) -> list[bytes]:
    """The pieces of a body with another name where its model stands, and every other byte as it was."""
    (start, end), spliced, before = span, [], 0
    for piece in pieces:
        after = before + len(piece)
        if before <= start < after:
            spliced += [piece[: start - before], json.dumps(name).encode("ascii"), piece[end - before :]]
        elif not start < before < end:
            spliced.append(piece)
        else:
            spliced.append(piece[end - before :])
        before = after
    return spliced


def model_span(body: bytes) -> tuple[int, int]:
    """Where the value of `model` stands, quotes included, in a short body that read_at_once() has read."""
    text, end = body.decode("utf-8"), 0
    while True:
        member = MEMBER.match(text, end)
        if not member:
            raise ValueError(f"the JSON text can't be walked at {end}")
        end = BODY_DECODER.raw_decode(text, member.end())[1]
        if json.loads(f'"{member[1]}"') == "model":
            return len(text[: member.end()].encode("utf-8")), len(text[:end].encode("utf-8"))


# -- forms: what streams through is looked at as it passes (RFC 7578, RFC 2046 §5.1.1)

FORM_BOUNDARY = re.compile(r'(?i); *boundary=(?:"([^"]{1,70})"|([^";, ]{1,70}))')
# The header of a part as clients write it, .NET without quotation marks, and as no server can read it otherwise. There
# is one way only to match a line: with two of them, a header that fails at its end would take time that each line
# doubles.
PART_HEADER = re.compile(
    rb"(?i)(?:\r\ncontent-(?:type|length):[^\r\n]*)*"
    rb'\r\ncontent-disposition: ?form-data; ?name=(?:"([^"\\\r\n%]*)"|([a-z0-9_.-]+))'
    rb'((?:; ?filename\*?=(?:"[^"\\\r\n]*"|[^"; \r\n]*))*)'
    rb"(?:\r\ncontent-(?:(?:type|length):[^\r\n]*|transfer-encoding: ?(?:binary|8bit)))*\r\n\r\n"
)
PART_CHARSET = re.compile(rb'(?i)charset="?(?!utf-?8[";\r])')
PART_LENGTH = re.compile(rb"(?i)\r\ncontent-length:[ \t]*([^\r\n]*)")  # some servers read no more


class FormWalk:
    """Looks for the field `model` of a form, piece by piece: before its file, or anywhere."""

    def __init__(self, boundary: str, anywhere: bool = False) -> None:
        self.model = self.last = ""  # the first one, and the last
        self.span = 0, 0  # where it stands
        self.settled = not boundary  # whether nothing more is looked for
        self._anywhere = anywhere
        self.is_ambiguous = False  # whether a server may find another model in it
        self.is_repeated = False  # whether the field stands behind the file once more
        self._mark = b"--" + boundary.encode("latin-1")
        self._held = b"\r\n"  # what isn't done with: the first delimiter begins a line, too
        self._at = -2  # how many bytes are
        # What goes on, a function and not a method, which would keep this object; False when more has to come first.
        self._go_on: Callable[[FormWalk], bool] = FormWalk._pass_content
        self._in_model = False
        self._lengths: set[bytes] = set()  # that its part has told
        self._parts = 0

    @property
    def seen(self) -> int:
        """How many bytes it was fed with."""
        return self._at + len(self._held)

    def feed(self, piece: bytes) -> None:
        """Takes the next piece. Raises BadRequest for a second `model` before its file, and for one that can't be
        one."""
        self._held += piece
        while self._go_on(self):
            pass

    def finish(self) -> None:
        """Takes note that nothing follows. Some servers take an LF alone for the end of a line, and so find one more
        field in a header that doesn't end."""
        if self._go_on == FormWalk._read_header:
            self._give_up()

    def _use(self, count: int) -> None:
        """Is done with so many bytes."""
        self._held = self._held[count:]
        self._at += count

    def _pass_content(self) -> bool:
        """Passes over the content of a part, to the next delimiter."""
        held, start = self._held, self._held.find(self._mark)
        end = start + len(self._mark)
        if self._at < 0 and not (b"\r\n" + self._mark).startswith(held[: len(self._mark) + 2]):
            return self._give_up()
        if start < 0 or len(held) < end + 2:
            if not self._in_model:
                self._use(max(0, (start if start >= 0 else len(held) - len(self._mark)) - 2))
            elif len(held) > FORM_FIELD_BYTES:
                raise BadRequest(f"model: Input should have at most {MODEL_CHARACTERS} characters")
            return False
        follows = held[end : end + 2]
        if held[max(0, start - 2) : start] != b"\r\n" or follows not in (b"\r\n", b"--"):
            return self._give_up()
        if self._in_model:
            self.last = model_name(held[: start - 2].decode("utf-8", "replace"))
            self.model = self.model or self.last
            self.span, self._in_model = (self._at, self._at + start - 2), False
            self.is_ambiguous |= not self._lengths <= {b"%d" % (start - 2)}
        self._go_on = FormWalk._read_header if follows == b"\r\n" else FormWalk._pass_rest
        self._use(end if follows == b"\r\n" else end + 2)
        return True

    def _read_header(self) -> bool:
        """Reads the header of a part."""
        end = self._held.find(b"\r\n\r\n") + 4
        if end < 4:
            return len(self._held) > FORM_FIELD_BYTES and self._give_up()
        header = self._held[:end]
        match = PART_HEADER.fullmatch(header) if end <= FORM_FIELD_BYTES else None
        self._parts += 1
        if not match or self._parts > FORM_PARTS:
            return self._give_up()
        name, file = (match[1] or match[2] or b"").decode("utf-8", "replace"), match[3]
        if name == "model" and not file and not self.settled:
            if self.span[1] and not self._anywhere:
                raise BadRequest("model: given more than once")
            self._in_model, self._lengths = True, set(PART_LENGTH.findall(header))
        self.is_repeated |= name == "model" and not file and not self._in_model and self.span[1] > 0
        # Some servers take `model[]` for a list of that name, and OpenAI takes `svg[model]` for who draws.
        names_model = is_model_name(name) or any(map(is_model_name, re.split(r"[][]+", name)))
        self.is_ambiguous |= names_model and not self._in_model
        self.is_ambiguous |= PART_CHARSET.search(header) is not None
        self.settled |= bool(file) and not self._anywhere
        self._use(end)
        self._go_on = FormWalk._pass_content
        return True

    def _pass_rest(self) -> bool:
        """Passes over what is behind the last part: nothing, or the end of its line."""
        self.settled = True
        return self._held not in (b"", b"\r", b"\r\n") and self._give_up()

    def _give_up(self) -> bool:
        """Looks at nothing more: it is no form that all read in the same way."""
        self.is_ambiguous = self.settled = True
        self._go_on = FormWalk._ignore
        return True

    def _ignore(self) -> bool:
        self._use(len(self._held))
        return False


class Inflater:
    """Decompresses a body in steps: gzip, deflate, and zstd where Python has it. Else raises UnsupportedCoding."""

    def __init__(self, pieces: Iterable[bytes], coding: str) -> None:
        self._pieces = (
            piece[start : start + INFLATED_FROM_BYTES]
            for piece in pieces
            for start in range(0, len(piece), INFLATED_FROM_BYTES)
        )
        self._coding = coding
        self._inflater: Any
        if coding == "zstd" and zstd:
            limit = {zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG}
            self._inflater = zstd.ZstdDecompressor(options=limit)
        elif coding in ("gzip", "x-gzip", "deflate"):
            # 32 lets zlib tell gzip and zlib headers apart (zlib manual, inflateInit2).
            self._inflater = zlib.decompressobj(32 + zlib.MAX_WBITS)
        else:
            hint = "; for Codex, set features.enable_request_compression=false" if coding == "zstd" else ""
            name = header_text(coding[:100])
            raise UnsupportedCoding(f"the content-encoding {name} can't be read here; send gzip or none{hint}")

    @property
    def finished(self) -> bool:
        """Whether the content is whole."""
        return bool(self._inflater.eof)

    def go_on(self) -> bytes:
        """The next piece of the content, of INFLATED_BYTES at most; it may be empty. Raises BadRequest."""
        # Not a member of its own: that would keep this object, and so all that isn't decompressed yet.
        content, goes_on = self._decompress_zstd() if self._coding == "zstd" else self._decompress_zlib()
        has_trailing_data = self.finished and (self._inflater.unused_data or any(self._pieces))
        if has_trailing_data or not (goes_on or content or self.finished):
            raise BadRequest(f"the body is not what its content-encoding {self._coding} says")
        return content

    def _decompress_zlib(self) -> tuple[bytes, bool]:
        """The next content, and whether there was something to decompress."""
        data = self._inflater.unconsumed_tail or next(self._pieces, b"")
        try:
            return self._inflater.decompress(data, INFLATED_BYTES), bool(data)
        except zlib.error:
            return b"", False

    def _decompress_zstd(self) -> tuple[bytes, bool]:
        """As _decompress_zlib(), but zstd's decompressor itself keeps what it hasn't decompressed yet."""
        held = not self._inflater.needs_input
        data = b"" if held else next(self._pieces, b"")
        try:
            return self._inflater.decompress(data, INFLATED_BYTES), held or bool(data)
        except zstd.ZstdError:
            return b"", False


# ==== Event streams =================================================================================
#
# https://html.spec.whatwg.org/multipage/server-sent-events.html: lines end in LF, CRLF or CR, and in
# nothing else, so they are cut as bytes (str would also break at U+2028, which JSON may hold). Lines are
# forwarded whole, so that an error can be told at the end of a stream that broke within a line. Also here: what a
# response, streamed or not, says that it used.

# A line that says that the stream is over: an event's name, or its data where there are no names; an error; the
# last chunk of OpenAI's chat format, which some servers follow up by [DONE] and some don't. Some write an empty reason,
# or "null", in all before it.
STREAM_ENDS = re.compile(
    rb'(?:^|[\r\n])(?:data: ?(?:\[DONE\]|\{ ?"error" ?: ?[{"])|(?:event: ?|data: ?\{ ?"type" ?: ?")'
    rb"(?:message_stop|error|response\.(?:completed|incomplete|failed|done)"
    rb"|transcript\.text\.done|speech\.audio\.done|image_(?:generation|edit)\.completed))"
    rb'|"finish_reason" ?: ?"(?!null")[^"]'
)
# Each of these ends has one of these words.
END_WORDS = (b"finish_reason", b"DONE]", b"_stop", b"response.", b".done", b".completed", b"error")
ENDS_IN_NAME = re.compile(rb"(?:^|[\r\n])event:[^\r\n]*(?:\r\n|\n|\r)\Z")  # an event's name without data behind it
BEGINS_EVENT = re.compile(rb"\A(?:\xef\xbb\xbf)?[\r\n]*(?:data|event|id|retry)?:")
# An error stands alone; or, of Responses, in an event that tells of the whole response; or, as OpenRouter sends it, in
# a chunk of chat, whose texts can't look like this, since their quotation marks are escaped. What else a chunk holds
# can: see is_error().
FIRST_EVENT_IS_ERROR = re.compile(
    rb'event: ?(?:error|response\.failed)[\r\n]|data: ?\{ ?"(?:error" ?: ?[{"]|type" ?: ?"(?:error|response\.failed)"'
    rb'|(id|object|model|provider|created)" ?:[^\r\n]*"(?:error" ?: ?\{ ?"|finish_reason" ?: ?"error"))'
)
EVENT_IS_ERROR = re.compile(rb"(?:^|[\r\n])(?:%b)" % FIRST_EVENT_IS_ERROR.pattern)
USAGE_DECODER = json.JSONDecoder(parse_constant=refuse_constant)
# The opening of a usage object, or as much of it as has come; OpenAI's service tier. OpenAI tells in other objects what
# an author of SVG used, apart from the picture's model, and what its tools did, apart from the response's. A quote
# behind a backslash is within a name: here and below, none such is taken for the beginning of one.
USAGE_OPENS = re.compile(rb'usage" {0,4}:? {0,4}(?:\{|\Z)')
TOLD_OF_USE = re.compile(rb'"(?<!\\")(?:(|svg_|tool_)%b|(service_tier)" ?: ?"([a-z_]{1,20})")' % USAGE_OPENS.pattern)
EVENT_TYPE = re.compile(
    rb'"type"(?<!\\"type") ?: ?"(message_(?:start|delta|stop)|content_block_[a-z]+|response\.[a-z_]+)"'
)
# The same in a line in which no more than numbers and words stand before it.
FIRST_EVENT_TYPE = re.compile(
    rb'(?:data: ?)?\{ ?(?:"[a-z_]{1,32}" ?: ?(?:[0-9]{1,20}|"[^"\\]{0,256}"|null) ?, ?){0,8}' + EVENT_TYPE.pattern
)
DRAWING_MODEL = "gpt-image-1"  # the dearest of those that may draw for a response, of which OpenAI tells no name
SVG_DEPTH = 2  # so much deeper than a response's usage is that of its pictures' authors, at most
OPENAI_TIER = re.compile(rb'"service_tier" ?: ?"([a-z_]{1,20})"')
ANSWERING_MODEL = re.compile(rb'"(model)"(?<!\\"model") ?: ?"([^"\\]{1,%d})"' % MODEL_CHARACTERS)
# What a usage object tells, in Anthropic's words and in OpenAI's two sets of them.
USAGE_NAMES = OPENAI_NAMES | {
    *ANTHROPIC_NAMES, "cache_creation", "service_tier", "speed", "inference_geo", "server_tool_use", "iterations",
    "completion_tokens_details", "total_tokens",
}  # fmt: skip


def is_cut_off(line: bytes) -> bool:
    """Whether the last line of a stream, which has no end, is data that was to be a JSON object, or could be."""
    name, _, data = line.partition(b":")
    data = data.lstrip()
    if line and not data:
        return b"data".startswith(name)
    if name != b"data" or not data.startswith(b"{"):
        return False
    try:
        BODY_DECODER.decode(data.decode("utf-8"))
    except (ValueError, RecursionError):
        return True
    return False


class LineSplitter:
    """Cuts a stream of bytes where its lines end."""

    def __init__(self) -> None:
        self.held = b""  # the beginning of a line
        self.mid_line = False  # whether what was given out last didn't end a line

    def feed(self, data: bytes) -> bytes:
        """All whole lines up to now; of a line over the limit, also what has come of it."""
        if self.held:
            data, self.held = self.held + data, b""
        if data.endswith(b"\n"):
            self.mid_line = False
            return data
        cut = data.rfind(b"\n") + 1
        # A CR behind the last LF ends a line too; should an LF follow, it goes out when it comes.
        cut = max(cut, data.rfind(b"\r", cut) + 1)
        if len(data) - cut > STREAM_LINE_BYTES:
            self.mid_line = True
            return data
        self.held = data[cut:]
        self.mid_line = self.mid_line and not cut
        return data[:cut]

    def flush(self) -> bytes:
        """What is left of a stream that ended properly without ending its last line."""
        held, self.held = self.held, b""
        return held


def line_start(data: bytes, at: int, since: int = 0) -> int:
    """Where the line of a stream begins in which that place is; 0 if it begins before another one."""
    return max(data.rfind(b"\n", since, at), data.rfind(b"\r", since, at)) + 1


def usage_size(text: str) -> int:
    """The size of a usage object: of one that has many values, at least that of a long one."""
    is_usual = text.count(",") + text.count("[") + text.count("{") <= USAGE_USUAL_VALUES
    return len(text) if is_usual else max(len(text), USAGE_USUAL_BYTES + 1)


def packed(usage: JsonDict, size: int) -> tuple[Union[JsonDict, bytes], int]:
    """A usage object of at most this size as it is kept: as text if it is long, since its values may take 30 times as
    much; and its size."""
    if size <= USAGE_USUAL_BYTES:
        return usage, size
    try:
        text = json.dumps(usage)
    except RecursionError:  # no real one is nested so deeply
        usage = plain_members(usage)
        text = json.dumps(usage)
    size = usage_size(text)
    return (text.encode("ascii") if size > USAGE_USUAL_BYTES else usage), size


def plain_members(usage: JsonDict) -> JsonDict:
    """What a usage object tells in numbers and words: its members without lists and objects."""
    return {name: told for name, told in usage.items() if not isinstance(told, (dict, list))}


def unpacked(kept: Union[JsonDict, bytes]) -> JsonDict:
    """The usage object that packed() has made this of."""
    try:
        return json.loads(kept) if isinstance(kept, bytes) else kept
    except RecursionError:
        return {}


class Nesting(NamedTuple):
    """A place in JSON, as far as it matters for how deep others behind it are."""

    depth: int = 0  # 0 is outside of it
    in_string: int = 0  # 1 in a string
    rest: bytes = b""  # a backslash, whose character hasn't come yet

    def behind(self, data: bytes) -> "Nesting":
        """The place behind these bytes."""
        data = self.rest + data
        rest = b"\\" * ((len(data) - len(data.rstrip(b"\\"))) % 2)
        parts = cut_at_quotes(data[: len(data) - len(rest)])
        deeper = deeper_by(b"".join(parts[self.in_string :: 2]))
        return Nesting(self.depth + deeper, (self.in_string + len(parts) - 1) % 2, rest)

    def depths(self, data: bytes, places: Sequence[int]) -> list[int]:
        """How deep these places in the bytes behind are, none of which is in a string."""
        pieces = [data[start:end] for start, end in zip((0, *places), places)]
        parts = cut_at_quotes(self.rest + b"\0".join(pieces))
        brackets = b"".join(parts[self.in_string :: 2]).split(b"\0")
        return [*itertools.accumulate(map(deeper_by, brackets), initial=self.depth)][1:]


OUTSIDE = Nesting()
NO_MARKS = bytes({*range(256)}.difference(b'"{}[]\0'))  # all bytes but those that depth depends on


def cut_at_quotes(data: bytes) -> list[bytes]:
    """The brackets in the data, cut at each quote: by turns those outside of strings and those within."""
    if b"\\" in data:
        data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    return data.translate(None, NO_MARKS).split(b'"')


def deeper_by(brackets: bytes) -> int:
    """How much deeper it is behind these."""
    return len(brackets.translate(None, b"}]\0")) - len(brackets.translate(None, b"{[\0"))


class Placed(NamedTuple):
    """What was found in a response, and where: how deep in it, or in its line of a stream, which begins there."""

    match: re.Match[bytes]
    line: int
    depth: int


def placed(pattern: re.Pattern[bytes], data: bytes, nesting: Nesting, is_stream: bool, since: int = 0) -> list[Placed]:
    """All that matches from there on, and isn't in a string, of many lines in the first and the last ones. `nesting` is
    the place where the data begin."""
    matches = [*pattern.finditer(data, since or len(nesting.rest))]
    if len(matches) == 1:  # as mostly
        at = matches[0].start()
        line = line_start(data, at) if is_stream else 0
        return [Placed(matches[0], line, (OUTSIDE if line else nesting).behind(data[line:at]).depth)]
    found: list[Placed] = []
    lines = [*by_line(data, matches, is_stream).items()]
    # See least_deep(): what others tell doesn't count.
    for line, inside in [*lines[:-USAGES_AT_ONCE][:1], *lines[-USAGES_AT_ONCE:]]:
        places = [match.start() - line for match in inside]
        depths = (OUTSIDE if line else nesting).depths(data[line : line + places[-1]], places)
        found += map(Placed, inside, itertools.repeat(line), depths)
    return found


def by_line(data: bytes, matches: Sequence[re.Match[bytes]], is_stream: bool) -> dict[int, list[re.Match[bytes]]]:
    """The matches by where the lines of a stream begin in which they are; else all together."""
    lines: dict[int, list[re.Match[bytes]]] = {}
    line = at = 0
    for match in matches:
        line = (line_start(data, match.start(), at) if is_stream else 0) or line
        at = match.start()
        lines.setdefault(line, []).append(match)
    return lines


def least_deep(found: Sequence[Placed]) -> list[Placed]:
    """Those of each kind that stand least deep in their lines, of many the last, and the first, which may be
    message_start's; and the last ones wherever they stand, since what isn't JSON has no depth."""
    kinds = [(one.line, one.match[1]) for one in found]
    least: dict[tuple[int, bytes], int] = {}
    for kind, one in zip(kinds, found):
        least[kind] = min(one.depth, least.get(kind, one.depth))
    telling = [one for kind, one in zip(kinds, found) if one.depth == least[kind]]
    return [*telling[:-USAGES_AT_ONCE][:1], *telling[-USAGES_AT_ONCE:], *found[-FEW_USAGES:]]


class Outermost:
    """Of what a response tells under one name, that which stands least deep, and of such the last."""

    __slots__ = ("depth", "value")

    def __init__(self) -> None:
        self.value: Any = None
        self.depth = math.inf

    def take(self, value: Any, depth: int) -> None:
        """Takes a value if none stands less deep."""
        if depth <= self.depth:
            self.value, self.depth = value, depth


class Usage:
    """What a response says was used, read from a copy of its bytes as they pass.

    Only the objects behind "usage" are parsed. The outermost counts, of several the last: others may be in what a
    client has sent, such as a tool's schema or metadata, which comes back in the answer, or in the input of a tool.
    Anthropic's message_delta has the totals without their details, so it is merged over message_start, where the output
    is a placeholder; so is what LiteLLM adds to message_stop."""

    def __init__(self) -> None:
        self._found: Union[JsonDict, bytes] = {}  # the usage, as far as it is told, by packed()
        self._size = 0  # of that
        self._depth = math.inf  # how deep it stands
        self._is_placeholder = False  # what it says of the output
        self._is_message = False  # whether a message_start has come
        self._tier = Outermost()  # OpenAI's service tier, which stands beside it,
        self._tools = Outermost()  # and what it says of tools, by packed()
        self._authors: dict[str, dict[str, int]] = {}  # what models used that have written pictures as SVG
        self._authors_place = -1, 0  # in which line these are told, and how deep,
        self._author_at = -1  # and where the last one is
        self.is_document = False  # whether the response is no stream, and has begun as JSON does
        self.seeks_model = False  # whether another model than the request's own may answer
        self._model = Outermost()  # which one has, if that is sought
        self._is_beginning = True  # whether no more than that of a response has come
        self._is_undeclared = False  # whether it is a stream that isn't called one
        self._held = b""  # a line of a stream, an object, or the name before it, whose rest hasn't come yet
        self._nesting = OUTSIDE  # where what is held begins,
        self._offset = 0  # how much of the response is before that,
        self._line = 0  # and before the line in which it is
        self._kind = b""  # the type of the event, if it was told in what isn't held any more

    @property
    def used(self) -> Used:
        """The tokens by their kinds, as far as they were told."""
        if not self._found:
            return NOTHING_TOLD
        # Anthropic has its tier within, and beside it raw input of tools, whose members may have any name.
        found = unpacked(self._found)
        is_openai = not OPENAI_NAMES.isdisjoint(found)
        used = used_of(found, self._tier.value.decode("ascii") if is_openai and self._is_beside(self._tier) else "")
        others: list[Any] = []
        if is_openai and self._is_beside(self._tools):
            tools = unpacked(self._tools.value)
            if counts_of(tools.get("image_gen")).get("output_tokens"):
                others.append({"model": DRAWING_MODEL, **tools["image_gen"]})
            searches = counts_of(tools.get("web_search")).get("num_requests", 0)
            used = used._replace(web_searches=max(used.web_searches, searches))
        if is_openai and self._authors_place[1] <= self._depth + SVG_DEPTH:
            others += [{"model": model, **counts} for model, counts in self._authors.items()]
        used = with_others(used, others) if others else used
        return used._replace(output=None) if self._is_placeholder else used

    def _is_beside(self, told: Outermost) -> bool:
        """Whether it is told, and no deeper than the usage."""
        return told.value is not None and told.depth <= self._depth

    @property
    def model(self) -> str:
        """The model that has answered, if that was sought and is told; else empty."""
        return self._model.value.decode("utf-8", "replace") if self._model.value else ""

    def read(self, data: bytes, is_stream: bool) -> None:
        """Looks through the next bytes of a response."""
        if self._held:
            data, self._held = self._held + data, b""
        if not is_stream:
            is_stream = self._begins_stream(data)
        held, since = max(0, len(data) - USAGE_NAME_BYTES), self._first_told(data)
        if since >= 0:
            held = self._look(data, is_stream, since, held)
        if self.seeks_model and b'"model"' in data:
            for name in placed(ANSWERING_MODEL, data, self._nesting, is_stream):
                self._model.take(name.match[2], name.depth)
        if is_stream and data.endswith(b"\n"):
            self._begin_line(len(data))
            self._offset += len(data)
            return
        line = line_start(data, len(data)) if is_stream else 0
        if line:
            self._begin_line(line)
        if len(data) - line > (USAGE_BYTES if is_stream else USAGE_USUAL_BYTES):
            self._is_beginning = False
            self._kind = self._kind or (self._kind_of(data, line) if is_stream else b"")
            self._nesting = self._nesting.behind(data[line:held])
        else:
            held = line
        self._offset += held
        self._held = data[held:]

    def _begin_line(self, at: int) -> None:
        """Notes that the line that goes on begins there in the data."""
        self._nesting, self._line, self._kind, self._is_beginning = OUTSIDE, self._offset + at, b"", False

    def _begins_stream(self, data: bytes) -> bool:
        """Whether the response is a stream all the same: some servers call theirs JSON, or plain text."""
        if self._is_beginning:
            self._is_undeclared = BEGINS_EVENT.match(data, 0, USAGE_BYTES) is not None
            self._is_beginning = not self._is_undeclared
            self.is_document = data[:USAGE_BYTES].lstrip().startswith((b"{", b"["))
        return self._is_undeclared

    def _first_told(self, data: bytes) -> int:
        """From where on the data may tell something of what was used; -1 if they don't. Each chunk of a chat tells of
        the tier once more, and that there is no usage yet."""
        usage, tier = data.find(b'usage"'), data.find(b'"service_tier"')
        opening = USAGE_OPENS.search(data, usage) if usage >= 0 else None
        if tier >= 0 and self._tier.depth <= 1 and {self._tier.value}.issuperset(OPENAI_TIER.findall(data)):
            tier = -1
        if not opening:
            return tier
        usage = max(0, opening.start() - len(b'"tool_'))
        return min(usage, tier) if tier >= 0 else usage

    def _look(self, data: bytes, is_stream: bool, since: int, held: int) -> int:
        """Takes what the data tell, from there on, outermost of what was used; from where on it is needed once more has
        come."""
        line, kind = -1, b""
        found = placed(TOLD_OF_USE, data, self._nesting, is_stream, since)
        for name in least_deep(found) if len(found) > FEW_USAGES else found:
            start, begin = name.match.start(), name.match.end() - 1
            if name.match[2]:
                self._tier.take(name.match[3], name.depth)
                continue
            try:
                text = data[begin : begin + USAGE_BYTES].decode("utf-8", "replace")
                usage, end = USAGE_DECODER.raw_decode(text)
            except (ValueError, RecursionError):
                held = min(held, max(start, len(data) - USAGE_BYTES))
                continue
            size = usage_size(text[:end])
            if name.match[1] == b"svg_":
                self._take_author(usage, name)
            elif name.match[1] == b"tool_":
                self._tools.take(packed(usage, size)[0], name.depth)
            elif not USAGE_NAMES.isdisjoint(usage) and (name.depth <= self._depth or not self._tells_tokens()):
                if is_stream and name.line != line:
                    line, kind = name.line, self._kind_of(data, name.line)
                self._take(usage, size, name.depth, kind)
        return held

    def _kind_of(self, data: bytes, line: int) -> bytes:
        """The type of the event whose line begins there in the data, or before them, where that matters for its usage.
        It stands first; or last, in one of vLLM's, which are in the order of OpenAI's Python types."""
        if self._kind and not line:
            return self._kind
        nesting, end = (OUTSIDE if line else self._nesting), data.find(b"\n", line)
        data = data[line : end if end >= 0 else len(data)]
        if b'"type"' not in data:  # as in each event of a chat
            return b""
        first = FIRST_EVENT_TYPE.match(data) if not nesting.depth else None
        if first:
            return first[1]
        return next((found.match[1] for found in placed(EVENT_TYPE, data, nesting, False) if found.depth == 1), b"")

    def _take(self, usage: JsonDict, size: int, depth: int, kind: bytes) -> None:
        """Takes what a usage object of this size tells, that stands so deep in an event of this kind."""
        if kind.startswith(b"content_block"):
            return  # a tool's input may have a `usage` of its own
        self._is_placeholder = kind == b"message_start"
        self._is_message = self._is_message or self._is_placeholder
        if kind in (b"message_delta", b"message_stop") or (self._is_message and not kind):  # its type is still to come
            found, size = unpacked(self._found), size + self._size
            if size > 2 * USAGE_BYTES:  # to read and write all of it once more with each event would take long
                found = plain_members(found)
            usage = {**found, **told_anew(usage, USAGE_NAMES)}
        if not self._found or any(tokens_of(usage)):  # some have nothing but zeros in all chunks but one
            self._found, self._size = packed(usage, size)
            self._depth = depth

    def _tells_tokens(self) -> bool:
        """Whether the usage that was found tells of any."""
        return any(tokens_of(unpacked(self._found)))

    def _take_author(self, usage: JsonDict, name: Placed) -> None:
        """Adds what OpenAI tells of who has written a picture as SVG; a response may have several, and of a stream, the
        last event tells of all of them once more."""
        line, at = (self._offset + name.line if name.line else self._line), self._offset + name.match.start()
        if line != self._authors_place[0] or name.depth < self._authors_place[1]:
            self._authors.clear()
        elif at <= self._author_at or name.depth > self._authors_place[1]:
            return
        self._authors_place, self._author_at = (line, name.depth), at
        author = usage["model"] if isinstance(usage.get("model"), str) else ""
        if len({*self._authors, author}) > SVG_AUTHORS:
            author = ""  # so that it has the price of the response's own model
        counts = counts_of(usage)
        before = self._authors.get(author, {})
        self._authors[author] = {
            kind: min(before.get(kind, 0) + counts.get(kind, 0), USAGE_COUNT)
            for kind in ("input_tokens", "output_tokens")
        }


NOTHING_READ = Usage()


# ==== Formats =======================================================================================
#
# A request in one chat format may go to a provider that speaks the other. Messages, Anthropic's format, is the hub: it
# says more than OpenAI's chat/completions, here called chat.
#
#   client of Messages   chat_request      ─▶ provider of chat        client of chat   messages_request ─▶ provider
#                        ◀─ ChatReader                                                 ◀─ MessageReader    of Messages
#
# A reader takes an answer document by document, as a stream brings them, and makes documents of the client's format of
# it; a whole answer is a stream of one document. So a whole answer and the same one streamed pass through the same
# code, and give the same message.
#
# What is a hint (caching, sampling, billing) may be left out, and is named to the client. What would make the answer
# wrong, or lacks its place in the other format, is refused. Nothing is fetched, repaired or made up, and nothing is
# remembered from one request to the next: what has to come back is put into what clients send back, ids of tool calls
# and signatures of thinking.
#
# Python gives each character of a string as many bytes as its widest one needs: an emoji makes four of each. So the
# documents here hold *narrow* text: each character stands for a byte of UTF-8, as narrow() makes them, and so they take
# as much as was received, and are written as they came. ASCII, which all words of the formats are in, is the same
# either way. What is told of a document to people is widened() again.

TRANSLATED_VALUES = 250_000  # in a body: `json` takes up to 50 ms for as many
TRANSLATED_ESCAPES = 2_000_000  # in its strings, and 0.2 s for these, in small steps: many clients escape all but ASCII
TRANSLATED_GROWTH = 3  # of a body, and some bytes: only one of a great many things that say nothing grows so
TRANSLATED_HELD_BYTES = 512 * 1024  # of an event, and of what waits for its turn in a streamed answer
WRITTEN_CHARACTERS = 64 * 1024  # of a string at a time
TAKEN_OUT_CHARACTERS = 2 * 1024  # of a string that is let go as soon as it is written
WRITTEN_ELEMENTS = 50  # of a list at a time
VALUE_CHARACTERS = 5  # of a number or a word, with the comma behind it
FRACTION_CHARACTERS = 100  # that take as long to write as a number with a fraction: up to 1 µs, for its last digits
WRITTEN_AT_ONCE_CHARACTERS = 512 * 1024  # which `json` writes within 3 ms, and nothing else runs meanwhile
READ_AT_ONCE_BYTES = 1024 * 1024  # of a body: reading it in parts costs a fifth more
# From Python 3.12 on, the garbage collector looks at all that was read at once behind that: 0.1 s for 240,000 lists.
READ_AT_ONCE_VALUES = 100_000
READ_LEVELS = 32  # of lists and objects in each other that are read in parts
READ_DEEP_BYTES = 512 * 1024  # of one that stands deeper: while `json` reads it, nothing else runs
WAITING_BYTES = 128  # that each piece of what waits takes besides
TRANSLATED_ANSWER_BYTES = 8 * 1024 * 1024  # of an answer that is translated as a whole; the longest have some 1 MB
# Of such an answer where it is a stream. The longest ones have some 130,000 tokens, each in an event of its own;
# as many take a second.
WHOLE_EVENTS = 150_000
WHOLE_LINES = 8 * WHOLE_EVENTS
WHOLE_BLOCKS = 10_000  # with citations, a message has a block for each sentence
WRITTEN_ANSWER_BYTES = 3 * TRANSLATED_ANSWER_BYTES  # of it in events for the client, each of which tells the model
# Of an event of a stream, while whose translation nothing else runs: values, and blocks of a message that is one event,
# or that an event lets go out at once.
EVENT_VALUES = 100_000
EVENT_PARTS = 60_000  # lists, objects, and twice the strings among them: nested ones have few commas between them
EVENT_FRACTIONS = 10_000  # numbers with a fraction among them; the longest take 2.5 µs each, to read and to write
FRACTION_DIGITS = 40  # of one of these; a longer one may take 8 µs and more, and counts as several
EVENT_BLOCKS = 1000
TOOL_CALLS = 128  # in an answer: as many tools as OpenAI allows in a request
TOOL_NAME_CHARACTERS = 256  # Anthropic allows 128, OpenAI 64
RENAMED_TOOLS = 1000  # in a request: they are remembered until the answer is over
TOOL_ID_CHARACTERS = 16 * 1024  # in an answer: LiteLLM puts what Gemini has to get back into it
SEAL_CHARACTERS = 64 * 1024  # of what Gemini, or OpenRouter for it, has to get back with a call
CARRYING_CHARACTERS = 128 * 1024  # of an id in a request: it may carry another one, and such a seal
CARRIED_VALUES = 4096  # in what such an id carries: two texts, which may have commas
SIGNATURE_CHARACTERS = 8 * TRANSLATED_HELD_BYTES  # each character of thinking may take six, and base64 a third more
DROPPED_NAMES = 20  # of what was left out are told
CHAT_STOPS = 4  # OpenAI's limit
USER_ID_CHARACTERS = 256  # Anthropic's limit
# Characters of JSON and code that most tokenizers make one token of, and what they make of other things.
TOKENS_PER_CHARACTER = 0.3
MESSAGE_TOKENS = 4
IMAGE_TOKENS = 1600
DOCUMENT_TOKENS_PER_CHARACTER = 0.037  # of base64: 2,500 for 50 KB

# In a text that is escaped once more: the escape of what can't stand in a JSON string as it is.
NEEDED_ESCAPE = re.compile(r"\\\\u(?=00(?:[01]|22|5[cC]))")
HALF_ESCAPE = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}")  # of the first half of a surrogate pair
LINE_ENDS = [(mark.encode("utf-8"), f"\\u{ord(mark):04x}".encode("ascii")) for mark in "\x85\u2028\u2029"]
TOOL_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")  # as Anthropic wants it
CALL_ID_KEPT = 56  # characters of one that is given a number; Anthropic takes 64 in all
CARRIED_ID = "toolu_x"  # begins an id that stands for another provider's, which is in it as base64, with its seal
CARRIED_THINKING = "mr1."  # begins a signature of ours
BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
DATA_URI = re.compile(r"data:([a-z]+/[a-z0-9.+-]+)(?:;[a-z0-9=_-]+)*;base64,", re.IGNORECASE)
DATA_URI_CHARACTERS = 256  # before the data; the usual ones have some 25
IMAGE_TYPES = ("image/jpeg", "image/png", "image/gif", "image/webp")
# What tools that run at Anthropic have left in the history.
SERVER_BLOCK = re.compile(r"server_tool_use|mcp_tool_use|mcp_tool_listing|fallback|advisor.*|[a-z_]+_tool_result")
TEXT_JOINT = "\n\n"  # between blocks that become one text
BLANK_CHARACTERS = " \t\n\r\x0b\x0c"  # of ASCII
BILLING_BLOCK = "x-anthropic-billing-header:"  # begins a text for Anthropic alone, which other caches stumble over


class Untranslatable(BadRequest):
    """The request says what the provider's format can't."""

    code = "untranslatable"


class NoThreads(Untranslatable):
    """The provider is to hold the conversation. The SDKs' tool runners ask for that, and send all of it themselves
    after this response."""

    details = types.MappingProxyType({"error_code": "thread_unsupported_request"})


class AnswerFault(Exception):
    """A provider's answer holds an error, or what no message can hold. `status` is what it should have had."""

    def __init__(self, message: str, status: int = 502, text: str = "", code: str = "upstream_broken") -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.text = text  # all that the provider said
        self.code = code  # by which the relay tells of it, where the provider said nothing

    @property
    def is_about_request(self) -> bool:
        """Whether it says nothing about the provider and its key, but about what was asked."""
        return is_about_request(self.status, self.text.encode("utf-8", "replace"))


class UnfitAnswer(AnswerFault):
    """A sound answer that no message can hold. Requests can bring it about."""

    is_about_request = True


class Asked(NamedTuple):
    """What a reader of the response has to know of the request that was translated."""

    format: str  # of the client, which the answer is to have
    model: str  # as the client calls it
    provider: str
    stream: bool
    id: str  # of the request
    created: int  # when, in seconds since 1970
    names: str = "{}"  # of tools: as sent, and as the client calls them, in JSON; as objects they take 5 times as much
    with_usage: bool = False  # whether a chat stream is to end with its usage
    thinking: str = "hidden"  # or "shown", or "omitted": a block without its text
    thinking_returns: bool = False  # whether the provider wants its thinking back
    input_tokens: int = 0  # by estimate
    max_tokens: int = 0  # that a message may have
    call_ids: Sequence[int] = ()  # hashes of the ids of calls in the conversation, as the client knows them, sorted
    system_speaks: bool = False  # later in the conversation than at its beginning, as it was sent
    refusable: Collection[str] = ()  # which of REFUSALS the request may meet

    def tool_name(self, sent: str) -> str:
        """A tool's name as the client calls it."""
        named = f'"{sent}":'
        at = self.names.find(named) if TOOL_ID.fullmatch(sent) else -1
        return sent if at < 0 else str(READER.raw_decode(self.names, at + len(named))[0])


class Translated(NamedTuple):
    """A request in the format of a provider."""

    path: str  # behind /v1
    body: list[bytes]  # in pieces
    dropped: tuple[str, ...]  # the names of what was left out
    asked: Asked


class Draft:
    """A translation that is being made: for whom, and what is left out of it."""

    def __init__(self, target: Target) -> None:
        self.model = narrow(target.model)
        self.provider = target.provider
        assert target.provider.translate
        self.settings = target.provider.translate
        self.names: dict[str, str] = {}  # of tools: as sent, and as the client calls them
        self.about_answer: JsonDict = {}  # what Asked has to know besides
        self.dropped: dict[str, None] = {}  # the names of what was left out, each once
        self._values = self._escapes = 0  # in the JSON texts that strings of it hold

    def drop(self, name: str) -> None:
        """Notes that something is left out."""
        if len(self.dropped) < DROPPED_NAMES:
            self.dropped[shown(name)] = None

    def drop_rest(self, members: Mapping[str, Any], known: Collection[str], place: str = "") -> None:
        """Notes which members are left out, since nobody here knows them."""
        for name, value in members.items():
            if name not in known and value is not None:
                self.drop(join(place, name))

    def refusal(self, place: str, what: str) -> Untranslatable:
        """The error for what can't be said to the provider."""
        format = "OpenAI" if self.provider.format == "openai" else "Anthropic"
        return Untranslatable(
            f"{place}: {shown(what)} can't be sent to the provider {self.provider.name} ({format} format)"
        )

    def refuse_members(self, members: Mapping[str, Any], refused: Iterable[str], place: str = "") -> None:
        """Raises Untranslatable for the first of these members that has a value."""
        for name in refused:
            if members.get(name) or members.get(name) == {}:  # which asks for what is usual
                raise self.refusal(join(place, name), "this field")

    def tool_name(self, name: str) -> str:
        """The name of a tool as it is sent: cut and marked where the other format would refuse it. Raises
        Untranslatable for one that is too long, and where too many are to be changed."""
        if characters(name) > TOOL_NAME_CHARACTERS:
            raise self.refusal("tools", f"a name of more than {TOOL_NAME_CHARACTERS} characters")
        longest = 64 if self.provider.format == "openai" else 128
        if re.fullmatch(r"[a-zA-Z0-9_-]+", name) and len(name) <= longest:
            return name
        digest = hashlib.sha256(name.encode("latin-1")).hexdigest()[:8]
        sent = f"{re.sub('[^a-zA-Z0-9_-]', '_', name[:55])}_{digest}"
        self.names[sent] = name
        if len(self.names) > RENAMED_TOOLS:
            odd = f"over {longest} characters or of others than letters, digits, _ and -"
            raise self.refusal("tools", f"more than {RENAMED_TOOLS} names {odd}")
        return sent

    def read_inner(self, texts: list[str]) -> Any:
        """The value of a JSON text that a string of the request holds. It is taken out of its list: it may be as long
        as the body, and is read in parts then. Raises ValueError, for a long one of anything but an object, too, and
        BadRequest where all such texts together would take `json` too long."""
        parts = [*slices(texts.pop())]
        self._values += sum(map(values_in, parts))
        self._escapes += sum(part.count("\\") for part in parts)
        check_weight(self._values, self._escapes)
        if sum(map(len, parts)) <= READ_AT_ONCE_BYTES and self._values <= READ_AT_ONCE_VALUES:
            return read_within("".join(parts))
        return DocumentReader(json_parts(map(encoded, taken(parts)))).read()

    def finished(self, body: JsonDict) -> JsonDict:
        """The body with what the settings of `translate` take out of it and put into it."""
        for name in map(narrow, self.settings.drop):
            if body.pop(name, None) is not None:
                self.drop(name)
        body.update(read_within(narrow(self.settings.extra)))
        return body


def translate_request(
    pieces: list[bytes], values: int, target: Target, asked_model: str, request_id: str, now: float
) -> Translated:
    """The request in a body in pieces, which has so many JSON values, in the format of the target. Raises BadRequest,
    Untranslatable for a sound one. What isn't needed any more is let go at once: it may be as large as the body, whose
    pieces are taken out of the list, too."""
    draft, size = Draft(target), sum(map(len, pieces))
    try:
        request = read_document(pieces, values)
        stream = request.get("stream") or False
        if not isinstance(stream, bool):
            raise BadRequest("stream: Input should be a valid boolean")
        if target.provider.format == "openai":
            format, path, made = "anthropic", "/chat/completions", chat_request(request, draft)
        else:
            format, path, made = "openai", "/messages", messages_request(request, draft)
        del request
        written = json_pieces(draft.finished(made))
    except RecursionError:
        raise BadRequest("the body is nested too deeply to be translated") from None
    limit = TRANSLATED_GROWTH * size + WRITTEN_CHARACTERS + len(draft.settings.extra)
    if sum(map(len, written)) > limit:
        longer = f"the body would become over {TRANSLATED_GROWTH} times as long in the provider's format"
        raise BadRequest(f"{longer}; send fewer tools or messages that are nearly empty")
    asked = Asked(
        format, asked_model, target.provider.name, stream, request_id, int(now), dump(draft.names), **draft.about_answer
    )
    return Translated(path, written, tuple(draft.dropped), asked)


# -- documents
#
# While `json` reads or writes, no other thread runs, and the values that it makes take many times their bytes. So a
# long document is read and written in parts: a DocumentReader lets go of the text that it has read; document_texts()
# writes members and elements one after the other, and lets go of each; json_texts() keeps long strings away from
# `json`; and in_parts() takes apart what would still keep it busy for too long.


def read_document(
    pieces: list[bytes], values: int, errors: str = "strict", reader: Optional[json.JSONDecoder] = None
) -> JsonDict:
    """The JSON object in the pieces, which have so many values, and are taken out of the list if they are many; a
    reader of their own is for short ones. Raises BadRequest for what is none, or would take `json` too long."""
    check_weight(values, sum(piece.count(b"\\") for piece in pieces))
    is_short = len(pieces) == 1 and len(pieces[0]) <= WRITTEN_CHARACTERS
    try:
        if sum(map(len, pieces)) > READ_AT_ONCE_BYTES or (values > READ_AT_ONCE_VALUES and not reader):
            return DocumentReader(json_parts(taken(pieces), errors)).read()
        document = (reader or READER).decode(
            narrow(without_escapes(pieces[0].decode("utf-8", errors))) if is_short else json_text(pieces, errors)
        )
    except ValueError as error:
        raise not_json(str(error)) from None
    if not isinstance(document, dict):
        raise BadRequest("the body must be a JSON object", "not_json")
    return document


class DocumentReader:
    """Reads a JSON object whose narrow text comes in parts. Of that it holds little more than what it is reading: the
    whole text and all its values together would take twice as much, and hold up other threads while `json` reads it."""

    def __init__(self, parts: Iterator[str]) -> None:
        self._parts = parts
        self._text = ""
        self._at = 0  # how far that is read

    def read(self) -> JsonDict:
        """The object. Raises ValueError for what is none."""
        found = self._object(1)
        if self._next():
            raise ValueError("something follows the object")
        return found

    def _object(self, level: int) -> JsonDict:
        found: JsonDict = {}
        mark = self._begin("{", "}")
        while mark != "}":
            name, mark = self._value(level)
            if mark != ":" or not isinstance(name, str):
                raise ValueError("a name in quotes and a colon must come before a value")
            found[name], mark = self._value(level)
            if mark not in ",}":
                raise ValueError("a comma or } must follow a member")
        return found

    def _list(self, level: int) -> list[Any]:
        elements: list[Any] = []
        mark = self._begin("[", "]")
        while mark != "]":
            element, mark = self._value(level)
            elements.append(element)
            if mark not in ",]":
                raise ValueError("a comma or ] must follow an element")
        return elements

    def _begin(self, opening: str, closing: str) -> str:
        """Takes the opening mark, and the closing one, too, where it follows; the last one."""
        self._take(opening)
        return self._take(closing) if self._next() == closing else opening

    def _take(self, marks: str) -> str:
        mark = self._next()
        if not mark or mark not in marks:
            raise ValueError(f"one of {marks} must stand where there is {mark or 'the end'}")
        self._at += 1
        return mark

    def _next(self) -> str:
        """The next character that isn't blank; empty at the end."""
        while True:
            found = NOT_BLANK.search(self._text, self._at)
            self._at = found.start() if found else len(self._text)
            if found or not self._read_on():
                return found[0] if found else ""

    def _value(self, level: int) -> tuple[Any, str]:
        """The value that follows, of an object or a list on that level, and the mark behind it, without which it may go
        on: the beginning of a number is one, too. Raises RecursionError for what is deep and long."""
        first = self._next()
        while True:
            try:
                value, end = READER.raw_decode(self._text, self._at)
                mark = NOT_BLANK.search(self._text, end)
                if mark and mark[0] in ",:]}":
                    self._at = mark.end()
                    return value, mark[0]
                if not mark:
                    self._text, self._at = self._text[self._at : end + 1], 0  # one blank is as good as many
                is_whole = True
            except json.JSONDecodeError:  # which would keep the text while the rest is read
                is_whole = False  # or it is malformed
            if not is_whole and first == '"':
                return self._string(), self._take(",:]}")
            if not is_whole and first in ("[", "{"):
                if level < READ_LEVELS:
                    return (self._list if first == "[" else self._object)(level + 1), self._take(",]}")
                if len(self._text) - self._at > READ_DEEP_BYTES:
                    raise RecursionError("what is nested so deeply is too long")
            if not self._read_on():
                raise ValueError("a value is malformed, or cut off")

    def _string(self) -> str:
        """The string that begins here, read part by part."""
        said: list[str] = []
        rest = self._text[self._at + 1 :]
        for part in itertools.chain(("",), self._parts):
            text = rest + part
            cut = end_of_escapes(text)
            told, end = READER.raw_decode(f'"{text[:cut]}"')
            said.append(told)
            if end < cut + len('""'):  # by a quotation mark of its own
                self._text, self._at = text, end - 1
                return "".join(said)
            rest = text[cut:]
        raise ValueError("a string is cut off")

    def _read_on(self) -> bool:
        """Adds at least as much text as is left unread, so that what is read once more is no more than that; False at
        the end."""
        parts = [self._text[self._at :]]
        self._text, self._at = "", 0
        wanted = max(1, len(parts[0]))
        for part in self._parts:
            parts.append(part)
            wanted -= len(part)
            if wanted <= 0:
                break
        self._text = "".join(parts)
        return len(parts) > 1


NOT_BLANK = re.compile(r"[^ \t\n\r]")


def json_text(pieces: Iterable[bytes], errors: str = "strict") -> str:
    """The pieces of a JSON document as narrow text. Raises ValueError."""
    return "".join(json_parts(pieces, errors))


def json_parts(pieces: Iterable[bytes], errors: str = "strict") -> Iterator[str]:
    """The pieces of a JSON document as parts of narrow text, without the escapes that JSON doesn't need. Raises
    ValueError."""
    decoder, rest = UTF_8(errors), ""
    for piece in pieces:
        for at in range(0, len(piece), WRITTEN_CHARACTERS):
            text = rest + decoder.decode(piece[at : at + WRITTEN_CHARACTERS])
            end = end_of_escapes(text)
            yield narrow(without_escapes(text[:end]))
            rest = text[end:]
    yield narrow(rest + decoder.decode(b"", final=True))


def end_of_escapes(text: str) -> int:
    """Where a part of a JSON text can be cut: before an escape that isn't whole, or whose other half may follow."""
    at = text.rfind("\\", -5)
    end = at if at >= 0 and text[at + 1 : at + 2] in ("", "u") and begins_escape(text, at) else len(text)
    return end - 6 if HALF_ESCAPE.fullmatch(text, end - 6, end) and begins_escape(text, end - 6) else end


def begins_escape(text: str, at: int) -> bool:
    """Whether the backslash there isn't escaped itself."""
    return (at - len(text[:at].rstrip("\\"))) % 2 == 0


def without_escapes(text: str) -> str:
    """A part of a JSON text in which escapes become the characters that they stand for, but where JSON needs them.
    Raises ValueError."""
    if "\\u" in text:
        # Each backslash left begins an escape, and is doubled; a NUL is left nowhere.
        text = json.dumps(text.replace(r"\\", r"\u005c"), ensure_ascii=False)
        text = json.loads(NEEDED_ESCAPE.sub("\0", text).replace(r"\\u", r"\u").replace("\0", r"\\u"))
    return text


def narrow(text: str) -> str:
    """The text with a character for each byte that it has in UTF-8."""
    return text if text.isascii() else text.encode("utf-8", "surrogatepass").decode("latin-1")


def widened(text: str) -> str:
    """What narrow() has made narrow; also a part of that."""
    return text if text.isascii() else text.encode("latin-1", "replace").decode("utf-8", "replace")


def shown(text: str) -> str:
    """Narrow text as far as it is told of."""
    return widened(text[: 4 * LOG_VALUE_CHARACTERS])[:LOG_VALUE_CHARACTERS]


def characters(text: str) -> int:
    """How many characters narrow text stands for."""
    if text.isascii():
        return len(text)
    return sum(len(part.encode("latin-1").translate(None, CONTINUATION_BYTES)) for part in slices(text))


def is_blank(text: str) -> bool:
    """Whether narrow text says nothing. A long one that is blank by blanks beyond ASCII is taken to say something."""
    if widened(text[:LOG_VALUE_CHARACTERS]).strip():
        return False
    # In parts: strip() would hold up all threads for as long as it takes.
    return not any(part.strip() for part in slices(text[LOG_VALUE_CHARACTERS:]))


def without_final_blanks(text: str) -> str:
    """Narrow text without the blanks at its end, of which there may be many in ASCII, and few others."""
    # In parts: over 30 MB of them, rstrip() would hold up all threads for 0.2 s.
    length = len(text)
    while length:
        start = max(0, length - WRITTEN_CHARACTERS)
        length = start + len(text[start:length].rstrip(BLANK_CHARACTERS))
        if length > start:
            break
    text = text[:length]
    end = widened(text[-WRITTEN_CHARACTERS:])
    return text[: len(text) - len(narrow(end[len(end.rstrip()) :]))]


def check_weight(values: int, escapes: int) -> None:
    """Raises BadRequest where so many would take `json` too long."""
    if values > TRANSLATED_VALUES or escapes > TRANSLATED_ESCAPES:
        raise BadRequest(f"more than {TRANSLATED_VALUES} values or {TRANSLATED_ESCAPES} escapes aren't translated")


def values_in(text: str) -> int:
    """How many values a JSON text has at most, but for its first."""
    return sum(part.count(mark) for part in slices(text) for mark in ",[{")


def finite(digits: str) -> float:
    """The number. Raises ValueError for one that is too large."""
    number = float(digits)
    if math.isinf(number):
        raise ValueError("a number is too large")
    return number


# Made once: `json` takes as long to make them as to read an event. What is read can be written again: 1e400 isn't read.
READER = json.JSONDecoder(parse_int=short_integer, parse_float=finite, parse_constant=refuse_constant)
# Writes a value as JSON text without blanks.
dump = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def read_within(text: str) -> Any:
    """The value of a JSON text that narrow text holds, narrow too. Raises ValueError, for a long one of anything but an
    object, too."""
    if len(text) > READ_AT_ONCE_BYTES or (len(text) > READ_AT_ONCE_VALUES and values_in(text) > READ_AT_ONCE_VALUES):
        return DocumentReader(json_parts(map(encoded, slices(text)))).read()
    return READER.decode(json_text(map(encoded, slices(text))) if "\\u" in text else text)


def json_characters(value: Any) -> int:
    """How many characters a value has as JSON text, but for escapes."""
    counted, waiting = 0, [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            counted += characters(value) + len('"",')
        elif isinstance(value, (dict, list)):
            counted += len("{},")
            waiting += value
            waiting += value.values() if isinstance(value, dict) else ()
        else:
            counted += VALUE_CHARACTERS
    return counted


def json_pieces(document: JsonDict) -> list[bytes]:
    """The document, which it takes apart, as JSON in UTF-8, in pieces that are neither long nor many."""
    pieces, last = [], bytearray()
    for text in document_texts(document):
        for part in slices(text):
            last += encoded(part)
            if len(last) >= WRITTEN_CHARACTERS:
                pieces.append(bytes(last))
                last.clear()
    return [*pieces, bytes(last)] if last else pieces


def document_texts(document: JsonDict) -> Iterator[str]:
    """The JSON text of a document, in parts. Its members, some elements at a time of lists that are such, and long
    strings are let go when they are written: no more than one of them is held twice."""
    before = "{"
    for name in list(document):
        value = document.pop(name)
        yield f"{before}{dump(name)}:"
        if isinstance(value, list):
            elements, mark = taken(value), "["
            while value:
                yield mark
                yield from json_texts(list(itertools.islice(elements, WRITTEN_ELEMENTS)))
                mark = ","
            yield "]" if mark == "," else "[]"
        else:
            yield from json_texts([value])
        before = ","
    yield "}" if before == "," else "{}"


def json_texts(values: list[Any]) -> Iterator[str]:
    """The JSON text of values, with commas between them, in parts. It takes them apart: what is long is let go when it
    is written."""
    mark = f"{random.getrandbits(128):032x}"  # which no client can foresee
    long, left = taken_out(values, mark)
    if left <= WRITTEN_AT_ONCE_CHARACTERS:
        texts = iter([dump(values)[1:-1]])
        values.clear()
    else:
        parts = in_parts(values)
        texts = iter(lambda: "".join(itertools.islice(parts, WRITTEN_ELEMENTS)), "")
    for text in texts:
        end = 0
        for place in re.finditer(f"{mark}([0-9]+){mark}", text) if long else ():
            yield text[end : place.start()]
            end, number = place.end(), int(place[1])
            for part in slices(long[number]):
                yield dump(part)[1:-1]
            long[number] = ""
        yield text[end:]


def dumped_in_parts(value: Any) -> str:
    """What dump() makes of a value, in more time, but without holding up other threads."""
    return "".join(json_texts([value]))


def taken_out(document: list[Any], mark: str) -> tuple[list[str], int]:
    """The long strings of a document, names too, in whose places it leaves their numbers between two marks; and about
    how many characters are left."""
    long: list[str] = []
    left = 0
    waiting: list[Any] = [document]
    while waiting:
        holder = waiting.pop()
        names = sum(map(len, holder)) if isinstance(holder, dict) else 0
        if names > TAKEN_OUT_CHARACTERS:
            take_names_out(holder, long, mark)
            names = sum(map(len, holder))
        left += names
        for key, value in members_of(holder):
            left += VALUE_CHARACTERS
            if isinstance(value, (dict, list)):
                waiting.append(value)
            elif isinstance(value, str) and len(value) <= TAKEN_OUT_CHARACTERS:
                left += len(value)
            elif isinstance(value, str):
                holder[key] = f"{mark}{len(long)}{mark}"
                long.append(value)
            elif isinstance(value, float):
                left += FRACTION_CHARACTERS
    return long, left


def take_names_out(holder: JsonDict, long: list[str], mark: str) -> None:
    """Adds the long names of an object to other long strings, and leaves their numbers between two marks."""
    for name in list(holder):
        value = holder.pop(name)
        if len(name) > TAKEN_OUT_CHARACTERS:
            long.append(name)
            name = f"{mark}{len(long) - 1}{mark}"
        holder[name] = value


def members_of(holder: Union[list[Any], JsonDict]) -> Iterator[tuple[Any, Any]]:
    """The members of an object, or the elements of a list with their places."""
    return iter(holder.items() if isinstance(holder, dict) else enumerate(holder))


def taken_members(holder: Union[list[Any], JsonDict]) -> Iterator[tuple[Any, Any]]:
    """The same, each of which is taken out of it. No list is made of them all: with that of 240,000 pairs, the garbage
    collector holds up all threads for 0.2 s."""
    if isinstance(holder, list):
        return enumerate(taken(holder))
    return ((name, holder.pop(name)) for name in list(holder))


def in_parts(values: list[Any], read: Callable[[Any], Iterator[tuple[Any, Any]]] = taken_members) -> Iterator[str]:
    """The JSON text of values, with commas between them, in parts that take `json` no time, however deep they stand.
    What is written is gone, unless it is `read` by members_of()."""
    holders = [(False, read(values))]
    comma = ""
    while holders:
        is_object, members = holders[-1]
        plain, inner = [], None
        for name, value in members:
            if value and isinstance(value, (dict, list)):
                inner = value
                break
            plain.append((name, value))
            if len(plain) == WRITTEN_ELEMENTS:
                break
        if plain:
            yield comma + dump(dict(plain) if is_object else [value for _, value in plain])[1:-1]
            comma = ","
        if inner:
            yield f"{comma}{dump(name) + ':' if is_object else ''}{'{' if isinstance(inner, dict) else '['}"
            comma = ""
            holders.append((isinstance(inner, dict), read(inner)))
        elif not plain:
            holders.pop()
            comma = ","
            if holders:
                yield "}" if is_object else "]"


def slices(text: str) -> Iterator[str]:
    """The parts of narrow text, none of which ends within a character."""
    at = 0
    while at < len(text):
        end = at + WRITTEN_CHARACTERS
        while "\x80" <= text[end : end + 1] <= "\xbf":
            end += 1
        yield text[at:end]
        at = end


def encoded(text: str) -> bytes:
    """Narrow JSON text in UTF-8, with escapes for halves of surrogate pairs, which that can't hold."""
    data = text.encode("latin-1")
    return data.decode("utf-8", "surrogatepass").encode("utf-8", "backslashreplace") if "\xed" in text else data


def on_one_line(data: bytes) -> bytes:
    """JSON in UTF-8 with escapes for what some clients take for the end of a line."""
    for end, escape in () if data.isascii() else LINE_ENDS:
        data = data.replace(end, escape)
    return data


# -- what requests are read with


def objects(value: Any, place: str) -> Iterator[tuple[str, JsonDict]]:
    """The objects of a list, each with its place. Raises BadRequest."""
    return ((f"{place}.{index}", item) for index, item in enumerate(checked_objects(value, place)))


def taken_messages(value: Any) -> Iterator[tuple[str, JsonDict]]:
    """A request's messages, each with its place. The list is emptied meanwhile: it may be most of a body. Raises
    BadRequest."""
    return ((f"messages.{index}", item) for index, item in enumerate(taken(checked_objects(value, "messages"))))


def checked_objects(value: Any, place: str) -> list[JsonDict]:
    """The list, if it is one of objects. Raises BadRequest."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise BadRequest(f"{place}: Input should be a list of objects")
    return value


def taken(items: list[Any]) -> Iterator[Any]:
    """The items of a list, which lets go of each when it is taken."""
    items.reverse()
    while items:
        yield items.pop()


def string(value: Any, place: str) -> str:
    """The string. Raises BadRequest."""
    if not isinstance(value, str):
        raise BadRequest(f"{place}: Input should be a valid string")
    return value


def text_in(members: JsonDict, name: str, place: str) -> str:
    """The string that a member is. Raises BadRequest."""
    return string(members.get(name), f"{place}.{name}")


def word(value: Any) -> str:
    """A word such as a type, as far as it is looked at and shown: what should be one may be anything, and large."""
    if not isinstance(value, str):
        return "(none)"
    return value if len(value) <= LOG_VALUE_CHARACTERS else narrow(shown(value))


def strings(value: Any, place: str) -> list[str]:
    """The strings of a list, or the one that stands for it. Raises BadRequest."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list):
        raise BadRequest(f"{place}: Input should be a list of strings")
    return [string(item, place) for item in items]


def listed_objects(value: Any) -> list[JsonDict]:
    """The objects of a list, whatever else is in it; none where there is no list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def check_members(members: JsonDict, names: Iterable[str], place: str = "") -> None:
    """Raises BadRequest for the first of these members that is no object: it would be left out in silence."""
    for name in names:
        if not isinstance(members.get(name, {}), (dict, type(None))):
            raise BadRequest(f"{join(place, name)}: Input should be an object")


def member(value: JsonDict, name: str) -> JsonDict:
    """The object that a member is, or an empty one."""
    found = value.get(name)
    return found if isinstance(found, dict) else {}


def call_name(value: Any, place: str) -> str:
    """The id of a call. Raises BadRequest."""
    if len(string(value, place)) > CARRYING_CHARACTERS:
        raise BadRequest(f"{place}: Input should have at most {CARRYING_CHARACTERS} characters")
    return str(value)


def positive_count(value: Any, place: str) -> int:
    """The number, which counts something and is more than 0. Raises BadRequest."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadRequest(f"{place}: Input should be an integer of 1 or more")
    return value


# Members of blocks that are carried, or are left out unnamed.
BLOCK_KNOWN = {
    "text": ("text", "citations"),
    "image": ("source",),
    "document": ("source", "title", "context", "citations"),
    "search_result": ("source", "title", "content", "citations"),
    "tool_reference": ("tool_name",),
    "compaction": ("content", "encrypted_content", "signature", "tool_changes"),
    "tool_addition": ("tool",),
    "tool_removal": ("tool",),
    "thinking": ("thinking", "signature"),
    "redacted_thinking": ("data",),
    "tool_use": ("id", "name", "input", "caller"),
    "tool_result": ("tool_use_id", "content", "is_error"),
}
THINKING_BLOCKS = ("thinking", "redacted_thinking")


def drop_from_block(block: JsonDict, draft: Draft) -> None:
    """Notes what is left out of a block."""
    kind = word(block.get("type"))
    if kind in BLOCK_KNOWN:
        draft.drop_rest(block, (*BLOCK_KNOWN[kind], "type", "cache_control"), kind)
    if block.get("citations") and block["citations"] != {"enabled": False}:
        draft.drop("citations")


class Turn(NamedTuple):
    """Messages of one role that follow each other, as one: their blocks, each with its place in the request."""

    role: str
    place: str
    blocks: list[tuple[str, JsonDict]]

    def of(self, kind: str) -> list[tuple[str, JsonDict]]:
        """Its blocks of a type."""
        return [(place, block) for place, block in self.blocks if block.get("type") == kind]


def turns_of(messages: Any, draft: Draft) -> Iterator[Turn]:
    """The turns of the messages, which it takes: text becomes a block. Raises BadRequest."""
    turn: Optional[Turn] = None
    to_come = sum(message.get("role") == "user" for message in checked_objects(messages, "messages"))
    for place, message in taken_messages(messages):
        role, content = message.get("role"), message.get("content")
        to_come -= role == "user"
        draft.drop_rest(message, ("role", "content", "clear_at"), "messages")
        if role == "system" and to_come and message.get("clear_at") == "next_user_message":
            content = without_texts(content)
        if isinstance(content, str):
            blocks = [(f"{place}.content", {"type": "text", "text": content})]
        else:
            blocks = list(objects([] if content is None else content, f"{place}.content"))
            for _, block in blocks:
                drop_from_block(block, draft)
        if turn and turn.role == role:
            turn.blocks.extend(blocks)
        else:
            if turn:
                yield turn
            turn = Turn(word(string(role, f"{place}.role")), place, blocks)
    if turn:
        yield turn


def without_texts(content: Any) -> Any:
    """What stays of the system's words for one turn of a user, once that is over: the changes of tools."""
    if not isinstance(content, list):
        return None if isinstance(content, str) else content
    return [block for block in content if not isinstance(block, dict) or block.get("type") != "text"]


def reminder(text: str) -> str:
    """A text of the system, marked, to stand within a user's message."""
    return f"<system-reminder>\n{text}\n</system-reminder>"


# -- Messages to chat: the request

# Where the answer would be wrong without them.
MESSAGES_REFUSED = ("container", "mcp_servers", "fallbacks", "inference_geo", "compaction")
MESSAGES_OBJECTS = ("thinking", "tool_choice", "output_config", "output_format", "metadata")
MESSAGES_KNOWN = {
    *MESSAGES_REFUSED, *MESSAGES_OBJECTS, "model", "messages", "system", "max_tokens", "temperature", "top_p",
    "stop_sequences", "stream", "tools", "cache_control", "thread",
}  # fmt: skip
# OpenAI's models, by host and name, which refuse `max_tokens`. Foundry's other hosts have those of others, too.
NEW_LIMIT = re.compile(
    r"(([a-z]+\.)?api\.openai\.com|[^/]*\.openai\.azure\.com)/"
    r"|[^/]*\.(cognitiveservices|services\.ai)\.azure\.com/(gpt-|o[1-9])"
)


def chat_request(request: JsonDict, draft: Draft) -> JsonDict:
    """A request of Messages as one of chat. Raises BadRequest."""
    draft.refuse_members(request, MESSAGES_REFUSED)
    check_members(request, MESSAGES_OBJECTS)
    if request.get("thread") is not None:
        raise NoThreads(draft.refusal("thread", "this field").message)
    input_tokens = estimated_tokens(request)
    if request.get("max_tokens") == 0:
        raise draft.refusal("max_tokens", "0")
    turns = ChatTurns(draft)
    chat = {
        "model": draft.model,
        "messages": turns.of(request),
        limit_name(draft): positive_count(request.get("max_tokens"), "max_tokens"),
    }
    chat.update((name, request[name]) for name in ("temperature", "top_p") if request.get(name) is not None)
    stops = strings(request.get("stop_sequences") or [], "stop_sequences")
    if len(stops) > CHAT_STOPS:
        raise draft.refusal("stop_sequences", f"more than {CHAT_STOPS} of them")
    if stops:
        chat["stop"] = stops
    if request.get("stream") is True:
        chat.update(stream=True, stream_options={"include_usage": True})
    chat.update(chat_tools(request, turns.changes, draft))
    chat.update(chat_reasoning(request, draft))
    chat.update(chat_output(request, draft))
    draft.drop_rest(request, MESSAGES_KNOWN)
    draft.drop_rest(member(request, "metadata"), (), "metadata")
    thinking = member(request, "thinking")
    display = "omitted" if thinking.get("display") == "omitted" else "shown"
    draft.about_answer = {
        "thinking": "hidden" if thinking.get("type") in ("disabled", None) else display,
        "thinking_returns": draft.settings.reasoning_back != "none",
        "input_tokens": input_tokens,
        "max_tokens": request["max_tokens"],
        "call_ids": turns.call_ids,
        "system_speaks": turns.system_speaks,
        "refusable": [name for name in REFUSALS if name in turns.media or REFUSED_MEMBERS.get(name) in chat],
    }
    return chat


def limit_name(draft: Draft) -> str:
    """The member by which the provider is told how long the answer may be."""
    if draft.settings.max_tokens_field != "auto":
        return draft.settings.max_tokens_field
    is_new = NEW_LIMIT.match(f"{draft.provider.host}/{draft.model}")
    return "max_completion_tokens" if is_new else "max_tokens"


CHOICES = {"auto": "auto", "required": "any", "none": "none"}  # of tools, by chat's word for them


class ToolChange(NamedTuple):
    """A tool that is offered, or no longer offered, from a place in the conversation on."""

    name: str  # as it is sent
    tool: JsonDict  # as chat has it, where it is defined there; else empty
    withdraws: bool


def tool_change(block: JsonDict, place: str, draft: Draft) -> ToolChange:
    """The change of which a `tool_addition` or `tool_removal` tells. Raises BadRequest."""
    given, withdraws = member(block, "tool"), block.get("type") == "tool_removal"
    kind = word(given.get("type"))
    if kind == "tool_definition":
        tool = chat_tool(member(given, "definition"), f"{place}.tool.definition", draft)
        return ToolChange(tool["function"]["name"], tool, withdraws)
    if kind != "tool_reference":
        raise draft.refusal(f"{place}.tool", f"a tool of the type {kind}")
    return ToolChange(draft.tool_name(text_in(given, "name", f"{place}.tool")), {}, withdraws)


def offered_tools(request: JsonDict, changes: Sequence[ToolChange], draft: Draft) -> list[JsonDict]:
    """The tools that are offered in the end, which are all that chat knows. Raises BadRequest."""
    listed = [chat_tool(tool, place, draft) for place, tool in objects(request.get("tools") or [], "tools")]
    defined = {change.name: change.tool for change in changes if change.tool}
    withdrawn = {change.name: change.withdraws for change in changes}  # by the last of each
    tools = [*(tool for tool in listed if tool["function"]["name"] not in defined), *defined.values()]
    return [tool for tool in tools if not withdrawn.get(tool["function"]["name"])]


def chat_tools(request: JsonDict, changes: Sequence[ToolChange], draft: Draft) -> JsonDict:
    """The members of a chat request that are about tools. Raises BadRequest."""
    written = offered_tools(request, changes, draft)
    choice = member(request, "tool_choice")
    kind = word(choice.get("type"))
    chat_choices = dict(zip(CHOICES.values(), CHOICES))
    if choice and kind not in chat_choices and kind != "tool":
        raise draft.refusal("tool_choice", f"the type {kind}")
    if not written and kind in ("any", "tool"):
        raise draft.refusal("tool_choice", "a call of a tool that isn't offered")
    if not written:
        return {}
    members: JsonDict = {"tools": written}
    if kind == "tool":
        name = draft.tool_name(text_in(choice, "name", "tool_choice"))
        members["tool_choice"] = {"type": "function", "function": {"name": name}}
    elif choice:
        members["tool_choice"] = chat_choices[kind]
    if choice.get("disable_parallel_tool_use") is True and kind != "none":
        members["parallel_tool_calls"] = False
    return members


TOOL_KNOWN = {
    "type", "name", "description", "input_schema", "strict", "allowed_callers", "cache_control", "defer_loading",
    "eager_input_streaming",
}  # fmt: skip


def chat_tool(tool: JsonDict, place: str, draft: Draft) -> JsonDict:
    """A tool of the client's own as one of chat. Raises BadRequest."""
    kind = tool.get("type") or "custom"
    if kind != "custom":
        raise draft.refusal(place, f"a tool of the type {word(kind)}")
    callers = strings(tool.get("allowed_callers") or "direct", f"{place}.allowed_callers")
    if "direct" not in callers:
        raise draft.refusal(f"{place}.allowed_callers", "a tool that only code may call")
    function: JsonDict = {"name": draft.tool_name(text_in(tool, "name", place))}
    if tool.get("description"):
        function["description"] = string(tool["description"], f"{place}.description")
    schema = member(tool, "input_schema")
    leave_patterns_out(schema, draft)
    function["parameters"] = with_object_type(schema, draft)
    if tool.get("strict") is True:
        function["strict"] = True
    if len(callers) > 1:
        draft.drop("tools.allowed_callers")
    draft.drop_rest(tool, TOOL_KNOWN, "tools")
    return {"type": "function", "function": function}


# What servers refuse in a regular expression, and the whole request with it: OpenAI and vLLM read it as Python does,
# and llama.cpp makes a grammar of it. Claude Code's Artifact has such ones, and what zod makes of z.email().
FOREIGN_PATTERN = re.compile(r"\(\?[=!<]|\\(?:[pPk0-9]|u\{)")


def leave_patterns_out(schema: JsonDict, draft: Draft) -> None:
    """Removes the patterns from a tool's schema that servers can't read. A pattern is only a hint for the model."""
    for part in schema_parts(schema):
        pattern = part.get("pattern")
        if isinstance(pattern, str) and FOREIGN_PATTERN.search(pattern.replace(r"\\", "")):
            del part["pattern"]
            draft.drop("tools.input_schema.pattern")


GEMINI_HOST = "generativelanguage.googleapis.com"
# What Gemini refuses wherever it stands in a schema.
GEMINI_REFUSED = frozenset(
    {"$schema", "additionalProperties", "propertyNames", "exclusiveMinimum", "exclusiveMaximum", "const"}
)


def with_object_type(schema: JsonDict, draft: Draft) -> JsonDict:
    """A tool's schema with what OpenAI requires at its root, and without what servers stumble over; else as it is."""
    found = {name: value for name, value in schema.items() if name != "$schema" and (name, value) != ("required", None)}
    found.setdefault("type", "object")
    if found["type"] == "object":
        found.setdefault("properties", {})
    if draft.provider.host == GEMINI_HOST:
        found = dict(without_refused(found))
    return found


def without_refused(schema: Any) -> Any:
    """A schema without what Gemini refuses."""
    if isinstance(schema, list):
        return [without_refused(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {}
    for name, value in schema.items():
        if name == "properties" and isinstance(value, dict):  # whose names are the tool's own
            found[name] = {key: without_refused(item) for key, item in value.items()}
        elif name not in GEMINI_REFUSED:
            found[name] = value if name in ("enum", "required", "default") else without_refused(value)
    return found


EFFORTS = ("low", "medium", "high", "xhigh", "max")


def chat_reasoning(request: JsonDict, draft: Draft) -> JsonDict:
    """How much the model is to think, where the provider can be told. Raises BadRequest."""
    thinking, output = member(request, "thinking"), member(request, "output_config")
    effort, kind, is_told = output.get("effort"), thinking.get("type"), draft.settings.reasoning != "none"
    draft.drop_rest(thinking, ("type", "display", "budget_tokens"), "thinking")
    if kind not in ("enabled", "adaptive", "disabled", None) or (kind in ("enabled", "adaptive") and not is_told):
        draft.drop("thinking")
    if kind == "disabled" or not is_told:
        draft.drop_rest({"output_config.effort": effort}, ())
        return {}
    budget = thinking.get("budget_tokens")
    if effort is None and isinstance(budget, (int, float)):
        effort = "low" if budget < 4096 else "medium" if budget < 16384 else "high"
    if effort is None:
        return {}
    if effort not in EFFORTS:
        raise BadRequest(f"output_config.effort: Input should be one of {', '.join(EFFORTS)}")
    return {"reasoning_effort": "xhigh" if effort == "max" else effort}


def chat_output(request: JsonDict, draft: Draft) -> JsonDict:
    """The form that the answer is to have. Raises BadRequest."""
    output = member(request, "output_config")
    check_members(output, ("format",), "output_config")
    form = member(output, "format") or member(request, "output_format")
    draft.drop_rest(output, ("effort", "format"), "output_config")
    if not form:
        return {}
    schema = form.get("schema")
    if form.get("type") != "json_schema" or not isinstance(schema, dict):
        raise draft.refusal("output_config.format", f"the type {word(form.get('type'))}")
    json_schema = {"name": "output", "schema": schema, "strict": is_strict(schema)}
    return {"response_format": {"type": "json_schema", "json_schema": json_schema}}


# What neither OpenAI nor Claude takes in a strict schema, what OpenAI refuses besides, and the formats that it knows:
# https://developers.openai.com/api/docs/guides/structured-outputs#supported-schemas
NEVER_STRICT = frozenset({
    "uniqueItems", "prefixItems", "contains", "minProperties", "maxProperties", "patternProperties", "propertyNames",
    "oneOf", "not", "if",
})  # fmt: skip
OPENAI_REFUSED = NEVER_STRICT | {
    "allOf", "dependentRequired", "dependentSchemas", "default", "minLength", "maxLength",
}  # fmt: skip
OPENAI_FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid")


def is_strict(schema: JsonDict) -> bool:
    """Whether OpenAI can promise to follow the schema: asked to, it refuses any other."""
    return all(map(fits_promise, schema_parts(schema)))


def fits_promise(part: JsonDict) -> bool:
    """Whether OpenAI takes a part of a strict schema, leaving aside the parts within it: an object names all that it
    may hold, and requires it; and each tells its type, which Anthropic's SDK leaves out beside an `enum` or `const`."""
    is_object = part.get("type") == "object" or "properties" in part
    if is_object and (part.get("additionalProperties") is not False or optional_in(part)):
        return False
    is_typed = "type" in part or "anyOf" in part or part.keys() == {"$ref"}  # nothing may stand beside that
    return is_typed and part.get("format", "date") in OPENAI_FORMATS and OPENAI_REFUSED.isdisjoint(part)


def schema_parts(schema: JsonDict) -> Iterator[JsonDict]:
    """The schema and those within it, each before its own."""
    waiting: list[Any] = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, dict):
            yield part
            within = ("items", "anyOf", "allOf", "oneOf", "additionalProperties")
            waiting += (part[name] for name in within if name in part)
            for name in ("properties", "$defs", "definitions"):
                if name in part:
                    waiting += member(part, name).values()


def optional_in(part: JsonDict) -> int:
    """How many of an object's parameters may be left out."""
    if "properties" not in part:
        return 0
    given = part.get("required")
    required = {name for name in given if isinstance(name, str)} if isinstance(given, list) else ()
    return sum(name not in required for name in member(part, "properties"))


# Mistral's models, at other providers too: they check requests with its mistral-common, or a template that does.
MISTRAL_MODEL = re.compile("mistral|ministral|magistral|devstral|codestral|mixtral|pixtral|voxtral", re.IGNORECASE)
# Gemini's models from 3 on refuse a turn whose first call lacks its signature. For one that another model has made,
# Google has this instead: https://ai.google.dev/gemini-api/docs/thought-signatures#faqs
SEALING_MODEL = re.compile(r"gemini-(?![12]\b)", re.IGNORECASE)
FOREIGN_SEAL = "skip_thought_signature_validator"
GOOGLE_HOST = re.compile(rf"{re.escape(GEMINI_HOST)}|([a-z0-9-]+-)?aiplatform\.googleapis\.com")  # and Vertex


class ChatTurns:
    """Writes the messages of a chat request: what answers calls directly behind them, then what a user says."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._is_mistral = draft.provider.host == "api.mistral.ai" or MISTRAL_MODEL.search(draft.model) is not None
        host, is_sealing = draft.provider.host, SEALING_MODEL.search(draft.model) is not None
        self._wants_seals = is_sealing and GOOGLE_HOST.fullmatch(host) is not None
        # Gateways before Gemini want back what they have passed on; OpenRouter has another place for it.
        self._takes_seals = host == GEMINI_HOST or (is_sealing and host != "openrouter.ai")
        # Where the system's later words go. Mistral takes them first of all, or behind a user's, and never as the last.
        self._system_turns = draft.settings.system_turns
        if self._is_mistral and self._system_turns == "keep":
            self._system_turns = "user"
        self._messages: list[JsonDict] = []
        self._calls: list[str] = []  # those of the last turn that aren't answered yet
        self._lead: list[str] = []  # what the system says at the beginning
        self._reminders: list[str] = []  # what it says later, and waits for the next place where it may stand
        self.changes: list[ToolChange] = []  # of tools, in their order
        self._call_ids: set[int] = set()  # hashes of all of the client's
        self.system_speaks = False  # later than at the beginning
        self.media: set[str] = set()  # what there is that models of text refuse, by its name in REFUSALS

    @property
    def call_ids(self) -> Sequence[int]:
        """Hashes of the ids of all calls, sorted, as they are held while the answer comes: in an array, where they take
        a tenth of the room."""
        return array.array("q", sorted(self._call_ids))

    def of(self, request: JsonDict) -> list[JsonDict]:
        """The messages for a request. Raises BadRequest."""
        self._lead = system_texts(request.get("system"), "system")
        writers = {"system": self._write_system, "user": self._write_user, "assistant": self._write_assistant}
        last: Optional[Turn] = None
        for turn in turns_of(request.get("messages"), self._draft):
            if turn.role not in writers:
                raise self._draft.refusal(f"{turn.place}.role", f"the role {turn.role}")
            writers[turn.role](turn)
            last = turn if turn.role != "system" and turn.blocks else last
        if not last:
            raise BadRequest("messages: at least one message is required")
        if last.role == "assistant":
            raise self._draft.refusal("messages", "a final assistant message (prefill)")
        for place, block in last.blocks:
            if SERVER_BLOCK.fullmatch(word(block.get("type"))):
                raise self._draft.refusal(place, f"a block of the type {word(block['type'])}")
        self._write_reminders()
        for message in self._messages:
            if isinstance(message["content"], list):
                message["content"] = content_of(message["content"])
        lead = [{"role": "system", "content": TEXT_JOINT.join(self._lead)}] if self._lead else []
        return lead + self._messages

    def _say(self, parts: list[JsonDict]) -> None:
        """Writes what the user says; some servers take no two messages of a user in a row, and Mistral none behind a
        result: "Unexpected role 'user' after role 'tool'"."""
        before = self._messages[-1]["role"] if self._messages else ""
        if before == "user" or (before == "tool" and self._is_mistral):
            self._messages[-1]["content"] += parts
        elif parts:
            self._messages.append({"role": "user", "content": parts})

    def _write_system(self, turn: Turn) -> None:
        """What the system says later on, where the provider wants it."""
        texts = [said for place, block in turn.blocks for said in self._system_texts(block, place)]
        is_first = self._is_mistral and self._draft.settings.system_turns == "keep" and not self._messages
        if self._system_turns == "lead" or is_first:
            self._lead += texts
        else:
            self._reminders += texts
        if self._system_turns == "keep" and not self._calls:
            self._write_reminders()

    def _system_texts(self, block: JsonDict, place: str) -> list[str]:
        """What a block of the system says; it may change which tools are offered."""
        if block.get("type") not in ("tool_addition", "tool_removal"):
            return system_texts([block], place)
        change = tool_change(block, place, self._draft)
        self.changes.append(change)
        return [f"Tool {'no longer ' * change.withdraws}available: {change.name}"]

    def _write_reminders(self) -> None:
        """Writes what waits, as the system's or the user's words."""
        if self._reminders and self._system_turns == "keep":
            self.system_speaks = True
            self._messages.append({"role": "system", "content": TEXT_JOINT.join(self._reminders)})
        else:
            self._say([text_part(reminder(said)) for said in self._reminders])
        self._reminders = []

    def _write_assistant(self, turn: Turn) -> None:
        """One message: its text, then its calls."""
        self._check_answered(turn, ())
        self._write_reminders()
        self._write_leftovers(turn)
        texts = [text_in(block, "text", place) for place, block in turn.of("text")]
        thoughts = [own_thinking(block, self._draft) for _, block in turn.of("thinking")]
        calls = [self._call(block, place) for place, block in turn.of("tool_use")]
        if not turn.blocks:
            return
        message: JsonDict = {"role": "assistant", "content": "".join(texts) or (None if calls else "")}
        message.update(self._thinking("".join(thoughts)))
        message.update(self._sealed_details(turn))
        if calls:
            message["tool_calls"] = calls
        if calls and self._wants_seals:
            calls[0].setdefault("extra_content", google_seal(FOREIGN_SEAL))
        self._messages.append(message)
        self._calls = [call["id"] for call in calls]

    def _write_leftovers(self, turn: Turn) -> None:
        """What isn't the assistant's own: a compaction tells what the user said before."""
        for place, block in turn.blocks:
            kind = word(block.get("type"))
            if kind == "compaction" or SERVER_BLOCK.fullmatch(kind):
                self._say(self._parts(block, place))
                for at, change in objects(block.get("tool_changes") or [], f"{place}.tool_changes"):
                    self.changes.append(tool_change(change, at, self._draft))
            elif kind not in ("text", "tool_use", *THINKING_BLOCKS):
                raise self._draft.refusal(place, f"a block of the type {kind}")

    def _thinking(self, thought: str) -> JsonDict:
        """The provider's own thinking, where it wants it back."""
        field = self._draft.settings.reasoning_back
        if field == "none" or (field == "reasoning" and not thought):
            return {}
        return {field: thought or " "}  # some refuse a turn without it, and some an empty one

    def _sealed_details(self, turn: Turn) -> JsonDict:
        """What OpenRouter, and who does as it does, has to get back with calls of Gemini's."""
        if self._draft.settings.reasoning_back != "reasoning" and self._draft.provider.host != "openrouter.ai":
            return {}
        calls = [carried_call(call_name(block.get("id"), place)) for place, block in turn.of("tool_use")]
        details = [detail for _, seal in calls for detail in self._sealed_detail(seal)]
        if calls and not details and SEALING_MODEL.search(self._draft.model):
            kind = {"type": "reasoning.encrypted", "format": "google-gemini-v1"}
            details = [{**kind, "data": FOREIGN_SEAL, "id": calls[0][0], "index": 0}]
        return {"reasoning_details": details} if details else {}

    def _sealed_detail(self, seal: str) -> list[JsonDict]:
        """The one that a seal is; none where it is another provider's."""
        try:
            return [self._draft.read_inner([seal])] if seal.startswith("{") else []
        except ValueError:
            return []

    def _call(self, block: JsonDict, place: str) -> JsonDict:
        given = block.get("input")
        if not isinstance(given, dict):
            raise self._draft.refusal(f"{place}.input", "what is no object")
        name = self._draft.tool_name(text_in(block, "name", place))
        id = call_name(block.get("id"), f"{place}.id")
        self._call_ids.add(hash(id))
        function = {"name": name, "arguments": dumped_in_parts(given)}
        call = {"id": self._call_id(id), "type": "function", "function": function}
        _, seal = carried_call(id)
        if seal and not seal.startswith("{") and self._takes_seals:
            call["extra_content"] = google_seal(seal)
        return call

    def _call_id(self, name: str) -> str:
        """The id of a call as this provider knows it, or wants it."""
        found, _ = carried_call(name)
        if not self._is_mistral or re.fullmatch("[a-zA-Z0-9]{9}", found):
            return found
        digits = int.from_bytes(hashlib.sha256(found.encode("latin-1")).digest(), "big")
        return "".join(BASE62[digits // 62**power % 62] for power in range(9))

    def _write_user(self, turn: Turn) -> None:
        """First the results of calls, each a message, then one with all the rest: pictures in results too, since a
        result holds text only."""
        results = turn.of("tool_result")
        rest = [(place, block) for place, block in turn.blocks if block.get("type") != "tool_result"]
        self._check_answered(turn, results)
        parts: list[JsonDict] = []
        for place, result in results:
            call_id = self._call_id(result["tool_use_id"])
            told, media = self._result(result, place)
            self._messages.append({"role": "tool", "tool_call_id": call_id, "content": [text_part(told)]})
            if media and (len(results) > 1 or rest):
                parts.append(text_part(f"[tool result {call_id}]"))
            parts += media
        self._calls = []
        self._write_reminders()
        for place, block in rest:
            parts += self._parts(block, place)
        self._say(parts)

    def _check_answered(self, turn: Turn, results: Sequence[tuple[str, JsonDict]]) -> None:
        """Raises BadRequest, in Anthropic's words, unless each call of the turn before has its result, and each result
        its call."""
        open_calls = dict.fromkeys(self._calls)
        for place, result in results:
            given = call_name(result.get("tool_use_id"), f"{place}.tool_use_id")
            if self._call_id(given) not in open_calls:
                raise Untranslatable(
                    f"{place}: unexpected `tool_use_id` found in `tool_result` blocks: {shown(given)}. "
                    "Each `tool_result` block must have a corresponding `tool_use` block in the previous message."
                )
            del open_calls[self._call_id(given)]
        if open_calls:
            raise Untranslatable(
                f"{turn.place}: `tool_use` ids were found without `tool_result` blocks immediately after: "
                f"{widened(', '.join(open_calls)[:ERROR_CHARACTERS])}"
            )

    def _result(self, result: JsonDict, place: str) -> tuple[str, list[JsonDict]]:
        """What a tool has returned: its text, and what isn't text."""
        parts = self._all_parts(result.get("content"), f"{place}.content")
        texts = [part["text"] for part in parts if part["type"] == "text"]
        media = [part for part in parts if part["type"] != "text"]
        told = TEXT_JOINT.join(texts) if texts or not media else "(see the next message)"
        if result.get("is_error") is True and not told.startswith("Error:"):
            told = f"Error: {told}" if told else "Error"
        return told, media

    def _all_parts(self, content: Any, place: str) -> list[JsonDict]:
        """The parts that a content becomes, if it is a text or blocks."""
        blocks = objects([text_part(content)] if isinstance(content, str) else content or [], place)
        return [part for at, block in blocks for part in self._parts(block, at)]

    def _parts(self, block: JsonDict, place: str) -> list[JsonDict]:
        """The parts of a chat message that a user's block becomes."""
        kind = word(block.get("type"))
        drop_from_block(block, self._draft)
        if kind == "text":
            said = text_in(block, "text", place)
            return [text_part(said)] if said else []
        if kind == "image":
            self.media.add("image_block")
            return [{"type": "image_url", "image_url": {"url": self._image_url(member(block, "source"), place)}}]
        if kind == "document":
            return self._document(block, place)
        if kind == "search_result":
            texts = [said for name in ("title", "source", "content") for said in plain_texts(block.get(name))]
            return [text_part(TEXT_JOINT.join(filter(None, texts)))]
        if kind == "tool_reference":
            return [text_part(f"Tool available: {word(block.get('tool_name'))}")]
        if kind == "compaction" and isinstance(block.get("content"), (str, type(None))):
            return [text_part(block["content"])] if block.get("content") else []  # one that has failed tells nothing
        if SERVER_BLOCK.fullmatch(kind):
            self._draft.drop(kind)
            return []
        raise self._draft.refusal(place, f"a block of the type {kind}")

    def _image_url(self, source: JsonDict, place: str) -> str:
        if source.get("type") == "base64":
            data = text_in(source, "data", f"{place}.source")
            return f"data:{text_in(source, 'media_type', f'{place}.source')};base64,{data}"
        if source.get("type") == "url":
            return text_in(source, "url", f"{place}.source")
        raise self._draft.refusal(place, f"an image with a source of the type {word(source.get('type'))}")

    def _document(self, block: JsonDict, place: str) -> list[JsonDict]:
        """A document: a PDF as a file, anything else as text under its title."""
        source, title, kind = member(block, "source"), block.get("title"), member(block, "source").get("type")
        context = self._all_parts(block.get("context"), f"{place}.context")
        if kind == "base64" and source.get("media_type") == "application/pdf":
            data = f"data:application/pdf;base64,{text_in(source, 'data', f'{place}.source')}"
            name = "".join(plain_texts(title)) or "document.pdf"
            self.media.add("document_block")
            return [*context, {"type": "file", "file": {"filename": name, "file_data": data}}]
        heading = self._all_parts(title, f"{place}.title") + context
        if kind == "text":
            return [*heading, text_part(text_in(source, "data", f"{place}.source"))]
        if kind == "content":
            return heading + self._all_parts(source.get("content"), f"{place}.source.content")
        raise self._draft.refusal(place, f"a document with a source of the type {word(kind)}")


def system_texts(value: Any, place: str) -> list[str]:
    """What the system says, without what is for Anthropic alone. Raises BadRequest."""
    if isinstance(value, str):
        return [value] if value else []
    blocks = objects([] if value is None else value, place)
    texts = [string(block.get("text", block.get("content")), at) for at, block in blocks]
    return [said for index, said in enumerate(texts) if said and not (index == 0 and said.startswith(BILLING_BLOCK))]


def text_part(said: str) -> JsonDict:
    """Text as a part of a message, the same in both formats."""
    return {"type": "text", "text": said}


def google_seal(seal: str) -> JsonDict:
    """What Gemini has to get back with a call, as it tells it."""
    return {"google": {"thought_signature": seal}}


def content_of(parts: list[JsonDict]) -> Union[str, list[JsonDict]]:
    """The parts as the content of a chat message: if all are text, as one text, since simple servers know no parts."""
    if all(part["type"] == "text" for part in parts):
        return TEXT_JOINT.join(part["text"] for part in parts)
    return parts


def plain_texts(content: Any) -> list[str]:
    """The texts of a content, in either format."""
    if isinstance(content, str):
        return [content]
    return [block["text"] for block in listed_objects(content) if isinstance(block.get("text"), str)]


def estimated_tokens(request: JsonDict) -> int:
    """How many tokens a request of Messages has, more or less: what its texts have, and its pictures and documents by
    size, never by their base64."""
    tokens, counted = 0.0, sum(map(characters, plain_texts(request.get("system"))))
    waiting: list[Any] = []
    for _, message in objects(request.get("messages") or [], "messages"):
        tokens += MESSAGE_TOKENS
        waiting.append(message.get("content"))
    while waiting:
        block = waiting.pop()
        if isinstance(block, str):
            counted += characters(block)
        elif isinstance(block, list):
            waiting += block
        elif isinstance(block, dict) and block.get("type") == "image":
            tokens += IMAGE_TOKENS
        elif isinstance(block, dict) and member(block, "source").get("type") == "base64":
            tokens += sum(map(len, plain_texts(block["source"].get("data")))) * DOCUMENT_TOKENS_PER_CHARACTER
        elif isinstance(block, dict) and block.get("type") == "tool_use":
            counted += characters(word(block.get("name"))) + json_characters(block.get("input"))
        elif isinstance(block, dict):
            waiting += filter(None, map(block.get, ("text", "thinking", "content", "source", "data", "title")))
    for _, tool in objects(request.get("tools") or [], "tools"):
        counted += sum(map(characters, (word(tool.get("name")), *plain_texts(tool.get("description")))))
        counted += json_characters(tool.get("input_schema", {}))
    return math.ceil(tokens + TOKENS_PER_CHARACTER * counted)


# -- what clients send back for the provider: ids of calls, and thinking


def utf8_of_base64(text: str, start: int) -> bytearray:
    """The text in UTF-8 that base64 from there on stands for. Raises ValueError for anything else."""
    if 0 <= text.find("=", start) < len(text) - 2:
        raise ValueError("it goes on behind its end")
    decoder, found = UTF_8(), bytearray()
    for at in range(start, len(text), WRITTEN_CHARACTERS):
        part = base64.b64decode(text[at : at + WRITTEN_CHARACTERS], validate=True)
        decoder.decode(part)
        found += part
    decoder.decode(b"", True)
    return found


def carrying_id(name: str, seal: str = "") -> str:
    """The id of a call as Anthropic takes it, from which carried_call() tells the provider's own, and its seal."""
    if TOOL_ID.fullmatch(name) and not seal and not name.startswith(CARRIED_ID):
        return name
    return CARRIED_ID + base64url(encoded(dump([name, seal])))


def carried_call(name: str) -> tuple[str, str]:
    """The id of a call that another one carries, else that one itself; and the seal of the call, if it has one."""
    if not name.startswith(CARRIED_ID):
        return name, ""
    try:
        text = json_text([from_base64url(name[len(CARRIED_ID) :])])
        id, seal = READER.decode(text) if values_in(text) < CARRIED_VALUES else (name, "")
        return string(id, ""), string(seal, "")
    except (ValueError, TypeError, RecursionError, RelayError):
        return name, ""  # it only looks like one


def thinking_signature(provider: str, thought: str) -> str:
    """The signature of a provider's thinking, which carries the text where that isn't shown."""
    carried = {"p": narrow(provider), "x": thought} if thought else {"p": narrow(provider)}
    return CARRIED_THINKING + base64url(encoded(dump(carried)))


def own_thinking(block: JsonDict, draft: Draft) -> str:
    """The text of a thinking block, if it is the provider's own; else nothing. Raises BadRequest."""
    sealed = block.get("signature")
    if not isinstance(sealed, str) or not sealed.startswith(CARRIED_THINKING) or len(sealed) > SIGNATURE_CHARACTERS:
        return ""
    try:
        carried = draft.read_inner([json_text([from_base64url(sealed[len(CARRIED_THINKING) :])])])
    except ValueError:
        return ""
    if not isinstance(carried, dict) or carried.get("p") != narrow(draft.provider.name):
        return ""
    thought = block.get("thinking") or carried.get("x")
    return thought if isinstance(thought, str) else ""


# -- chat to Messages: the request

CHAT_REFUSED = (
    "audio", "web_search_options", "logprobs", "top_logprobs", "functions", "function_call", "moderation",
)  # fmt: skip
# Passed on as they are: clients of chat put them where Anthropic's own endpoint for chat takes them, too.
CHAT_PASSED = ("top_k", "thinking", "cache_control")
# What says nothing when it has this value.
CHAT_NOTHING = {
    "n": 1, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "modalities": ["text"], "store": False,
    "logprobs": False, "top_logprobs": 0, "parallel_tool_calls": True,
}  # fmt: skip
CHAT_KNOWN = {
    *CHAT_REFUSED, *CHAT_PASSED, "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "n", "stop", "stream", "stream_options", "tools", "tool_choice", "parallel_tool_calls", "response_format",
    "reasoning_effort", "service_tier", "user", "safety_identifier",
}  # fmt: skip
ANY_OBJECT = "Answer with one JSON object only."
CACHE_MARKS = ("cache_control", "copilot_cache_control")  # as Anthropic calls it, and as VS Code does


def messages_request(chat: JsonDict, draft: Draft) -> JsonDict:
    """A request of chat as one of Messages. Raises BadRequest."""
    chat = {name: value for name, value in chat.items() if value is not None and CHAT_NOTHING.get(name, ()) != value}
    draft.refuse_members(chat, CHAT_REFUSED)
    check_members(chat, ("response_format", "stream_options"))
    if "n" in chat:
        raise draft.refusal("n", "more than one choice")
    if "modalities" in chat and "audio" in strings(chat["modalities"], "modalities"):
        raise draft.refusal("modalities", "audio")
    turns = MessageTurns(draft)
    messages = turns.of(chat)
    request: JsonDict = {
        "model": draft.model,
        "messages": messages,
        "max_tokens": longest_answer(chat, draft),
        **passed_members(chat, messages, draft),
        **message_sampling(chat, draft),
        **message_tools(chat, draft),
        **message_output(chat, draft, turns.system),
    }
    if turns.system:
        plain = len(turns.system) == 1 and set(turns.system[0]) == {"type", "text"}
        request["system"] = turns.system[0]["text"] if plain else turns.system
    if chat.get("stream") is True:
        request["stream"] = True
    for name in ("safety_identifier", "user"):
        user = chat.get(name)
        if "metadata" not in request and isinstance(user, str) and "@" not in user and len(user) <= USER_ID_CHARACTERS:
            request["metadata"] = {"user_id": user}
        elif user:
            draft.drop(name)
    tier = {"auto": "auto", "default": "standard_only"}.get(word(chat.get("service_tier")))
    if tier:
        request["service_tier"] = tier
    elif "service_tier" in chat:
        draft.drop("service_tier")
    draft.drop_rest(chat, CHAT_KNOWN)
    draft.drop_rest(member(chat, "stream_options"), ("include_usage",), "stream_options")
    draft.about_answer = {"with_usage": member(chat, "stream_options").get("include_usage") is True}
    return request


def passed_members(chat: JsonDict, messages: list[JsonDict], draft: Draft) -> JsonDict:
    """What Messages has by the same names, but for a budget of thinking that Claude would refuse."""
    members = {name: chat[name] for name in CHAT_PASSED if name in chat}
    if member(members, "thinking").get("type") == "enabled" and lacks_thinking(messages):
        del members["thinking"]
        draft.drop("thinking")
    if "top_k" in members and is_told_to_think(chat, draft):
        del members["top_k"]
        draft.drop("top_k")
    return members


def is_told_to_think(chat: JsonDict, draft: Draft) -> bool:
    """Whether the effort that a chat asks for becomes thinking, beside which Claude refuses all sampling but its usual
    one: "`temperature` may only be set to 1 when thinking is enabled or in adaptive mode"."""
    return draft.settings.reasoning != "none" and chat.get("reasoning_effort") not in (None, "none")


def lacks_thinking(messages: list[JsonDict]) -> bool:
    """Whether the last turn, but for the system's, begins with results of calls, and no turn has thinking, since the
    client doesn't send it back: few clients of chat do. Claude refuses to think by a budget then."""
    last = next((message for message in reversed(messages) if message["role"] != "system"), messages[-1])
    kinds = {block["type"] for message in messages for block in message["content"]}
    return last["content"][0]["type"] == "tool_result" and kinds.isdisjoint(THINKING_BLOCKS)


def longest_answer(chat: JsonDict, draft: Draft) -> int:
    """How many tokens the answer may have. Raises BadRequest."""
    for name in ("max_completion_tokens", "max_tokens"):
        if chat.get(name) not in (None, 0, -1):  # which some clients send for no limit
            return positive_count(chat[name], name)
    usual, budget = draft.settings.default_max_tokens, member(chat, "thinking").get("budget_tokens")
    # Claude refuses an answer that may not be longer than its thinking.
    return usual + budget if isinstance(budget, int) and budget >= usual else usual


def message_sampling(chat: JsonDict, draft: Draft) -> JsonDict:
    """Temperature, or else top_p: Claude refuses both at once, and where it thinks, most values. And where to stop."""
    members: JsonDict = {name: chat[name] for name in ("temperature", "top_p") if name in chat}
    if isinstance(members.get("temperature"), (int, float)) and members["temperature"] > 1:
        members["temperature"] = 1
        draft.drop("temperature")
    refused = ["top_p"] if len(members) > 1 else []
    refused += [name for name in members if members[name] != 1] if is_told_to_think(chat, draft) else []
    for name in refused:
        members.pop(name, None)
        draft.drop(name)
    stops = strings(chat.get("stop") or [], "stop")
    kept = [stop for stop in stops if not is_blank(stop)]
    if len(kept) < len(stops):
        draft.drop("stop")
    return {**members, "stop_sequences": kept} if kept else members


def message_tools(chat: JsonDict, draft: Draft) -> JsonDict:
    """The members of a request of Messages that are about tools. Raises BadRequest."""
    tools = [message_tool(tool, place, draft) for place, tool in objects(chat.get("tools") or [], "tools")]
    given = chat.get("tool_choice")
    choice = given if isinstance(given, dict) else {"type": given}
    written: JsonDict = {}
    kind = word(choice.get("type"))
    if kind == "allowed_tools":
        allowed = member(choice, kind)
        names = {
            draft.tool_name(string(member(nested_tool(tool), "function").get("name"), "tool_choice"))
            for _, tool in objects(allowed.get("tools"), "tool_choice.allowed_tools.tools")
        }
        tools = [tool for tool in tools if tool["name"] in names]
        written = {"type": "any" if allowed.get("mode") == "required" else "auto"}
    elif kind in ("function", "tool"):
        name = string((member(choice, kind) or choice).get("name"), "tool_choice.function.name")
        written = {"type": "tool", "name": draft.tool_name(name)}
    elif kind in CHOICES or kind == "any":
        written = {"type": CHOICES.get(kind, kind)}
    elif given is not None:
        raise draft.refusal("tool_choice", f"the type {kind}")
    if not tools and written.get("type") in ("any", "tool"):
        raise draft.refusal("tool_choice", "a call of a tool that isn't offered")
    if not tools:
        return {}
    keep_strict(tools, member(member(member(chat, "response_format"), "json_schema"), "schema"), draft)
    one_by_one = chat.get("parallel_tool_calls") is False or choice.get("disable_parallel_tool_use") is True
    if one_by_one and written.get("type") != "none":
        written = {"type": "auto", **written, "disable_parallel_tool_use": True}
    return {"tools": tools, "tool_choice": written} if written else {"tools": tools}


def message_tool(tool: JsonDict, place: str, draft: Draft) -> JsonDict:
    """A function of chat as a tool of Messages. Raises BadRequest."""
    tool = nested_tool(tool)
    if tool.get("type") != "function":
        raise draft.refusal(place, f"a tool of the type {word(tool.get('type'))}")
    function = member(tool, "function")
    draft.drop_rest(tool, ("type", "function", *CACHE_MARKS), "tools")
    draft.drop_rest(function, ("name", "description", "parameters", "strict", *CACHE_MARKS), "tools.function")
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise draft.refusal(f"{place}.function.parameters", "what is no schema of an object")
    written: JsonDict = {"name": draft.tool_name(text_in(function, "name", f"{place}.function"))}
    if function.get("description"):
        written["description"] = string(function["description"], f"{place}.function.description")
    written["input_schema"] = schema if "type" in schema else {"type": "object", **schema}
    if function.get("strict") is True:
        written["strict"] = True
    cached = cache_mark(tool) or cache_mark(function)
    return {**written, "cache_control": cached} if cached else written


# Claude makes one grammar of all strict tools and the answer's form. What it refuses in the tools' schemas, which
# formats it knows, and how many tools, optional parameters and parameters of several types it takes in all:
# https://platform.claude.com/docs/en/build-with-claude/structured-outputs
STRICT_REFUSED = NEVER_STRICT | {
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength", "maxItems",
}  # fmt: skip
STRICT_FORMATS = (*OPENAI_FORMATS, "uri")
STRICT_LIMITS = (20, 24, 16)
STRICT_DEFINITIONS = 1000  # in a schema; Claude refuses a grammar that is too large


def keep_strict(tools: list[JsonDict], form: JsonDict, draft: Draft) -> None:
    """Leaves out `strict` where Claude would refuse it with the whole request, and of all tools where they are too much
    together, or with the schema of the answer's form. openai-agents and LangChain's agents ask for it at each tool, and
    OpenAI promises more."""
    loads = [(tool, strict_load(tool["input_schema"])) for tool in tools if "strict" in tool]
    sums = map(sum, zip((0, *choices_in(form)), *(load for _, load in loads if load)))
    are_few = all(number <= most for number, most in zip(sums, STRICT_LIMITS))
    for tool, load in loads:
        if not load or not are_few:
            del tool["strict"]
            draft.drop("tools.function.strict")


def strict_load(schema: JsonDict) -> tuple[int, ...]:
    """What a strict tool with this schema adds to each of STRICT_LIMITS; empty if Claude refuses it."""
    if is_circular(schema) or not all(map(fits_strict, schema_parts(schema))):
        return ()
    return (1, *choices_in(schema))


def choices_in(schema: JsonDict) -> tuple[int, int]:
    """How many optional parameters a schema has, and how many of several types."""
    optional = unions = 0
    for part in schema_parts(schema):
        optional += optional_in(part)
        unions += "anyOf" in part or isinstance(part.get("type"), list)
    return optional, unions


def is_circular(schema: JsonDict) -> bool:
    """Whether the schema, or a definition in it, holds itself, as that of a tree does: OpenAI takes it, and Claude says
    `Circular reference detected in schema definitions`. One with very many definitions is taken to."""
    holders = {"#": schema}
    for group in ("$defs", "definitions"):
        holders.update((f"#/{group}/{name}", part) for name, part in member(schema, group).items())
    if len(holders) > STRICT_DEFINITIONS:
        return True
    held = {
        name: {part["$ref"] for part in schema_parts(holder) if isinstance(part.get("$ref"), str)} & holders.keys()
        for name, holder in holders.items()
    }
    try:
        graphlib.TopologicalSorter(held).prepare()
    except graphlib.CycleError:
        return True
    return False


def fits_strict(part: JsonDict) -> bool:
    """Whether Claude takes a part of a strict tool's schema, leaving aside the parts within it, and objects that are
    open to other parameters: those OpenAI refuses, too."""
    is_known = part.get("minItems", 0) in (0, 1) and part.get("format", "uri") in STRICT_FORMATS
    return is_known and STRICT_REFUSED.isdisjoint(part)


def nested_tool(tool: JsonDict) -> JsonDict:
    """A tool as chat has it: Cursor may send those of Messages, or of Responses."""
    if "function" in tool or "name" not in tool or not ("input_schema" in tool or tool.get("type") == "function"):
        return tool
    function = {name: value for name, value in tool.items() if name not in ("type", "input_schema")}
    schema = {"parameters": tool["input_schema"]} if "input_schema" in tool else {}
    kind = tool.get("type", "custom")
    return {"type": "function" if kind == "custom" else kind, "function": {**function, **schema}}


def message_output(chat: JsonDict, draft: Draft, system: list[JsonDict]) -> JsonDict:
    """The form that the answer is to have, and how much thought goes into it. Raises BadRequest."""
    members: JsonDict = {}
    config: JsonDict = {}
    form = member(chat, "response_format")
    kind = word(form.get("type", "text"))
    if kind == "json_schema":
        schema = member(form, "json_schema").get("schema")
        if not isinstance(schema, dict):
            raise BadRequest("response_format.json_schema.schema: Input should be an object")
        config["format"] = {"type": "json_schema", "schema": schema}
    elif kind == "json_object":
        system.append(text_part(ANY_OBJECT))
        draft.drop("response_format")
    elif kind != "text":
        raise draft.refusal("response_format", f"the type {kind}")
    effort = chat.get("reasoning_effort")
    if effort is not None and draft.settings.reasoning == "none":
        draft.drop("reasoning_effort")
    elif effort == "none":
        members["thinking"] = {"type": "disabled"}
    elif effort is not None:
        members["thinking"] = {"type": "adaptive"}
        config["effort"] = "low" if effort == "minimal" else string(effort, "reasoning_effort")
    return {**members, "output_config": config} if config else members


# Members of chat messages and their parts that are carried, or are left out unnamed; empty ones aren't named either.
CHAT_MESSAGE_KNOWN = (
    "role", "content", "name", "refusal", "tool_calls", "tool_call_id", "thinking_blocks", "reasoning_content",
    "reasoning", *CACHE_MARKS,
)  # fmt: skip
PART_KNOWN = ("type", "text", "refusal", "image_url", "file", *CACHE_MARKS)
# Blocks of Messages that Cursor sends to Claude as parts, and their members.
OWN_KNOWN = {"tool_use": ("id", "name", "input"), "tool_result": ("tool_use_id", "content", "is_error")}


def cache_mark(holder: JsonDict) -> Any:
    """The mark of the cache that a part of a chat request has, if any."""
    return next(filter(None, map(holder.get, CACHE_MARKS)), None)


def with_cache_mark(blocks: list[JsonDict], holder: JsonDict) -> list[JsonDict]:
    """The blocks of a message, or of what else holds a mark of the cache: the last one gets that, unless it has one.
    opencode and VS Code mark whole messages, others their parts."""
    mark = cache_mark(holder)
    if mark and blocks and blocks[-1]["type"] not in THINKING_BLOCKS:  # where Anthropic refuses it
        blocks[-1].setdefault("cache_control", mark)
    return blocks


def handed_back(block: JsonDict) -> JsonDict:
    """A block of thinking as Claude wants it back: one that isn't shown must have its text, too, which is empty."""
    kept = {name: value for name, value in block.items() if name != "index"}
    return {**kept, "thinking": kept.get("thinking") or ""} if kept["type"] == "thinking" else kept


class MessageTurns:
    """Writes the messages of a request of Messages: results of calls come first in the user's turn behind them."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self.system: list[JsonDict] = []  # what the system says at the beginning
        self._messages: list[JsonDict] = []
        self._later: list[JsonDict] = []  # what it says later, and waits for the place where it may stand
        self._calls: dict[str, str] = {}  # those of the last turn, by the ids that the client knows: as they are sent
        self._call_ids: set[str] = set()  # those of all turns, as sent
        self._renamed = 0  # how many numbers were given to calls, or tried: each once, whatever ids a client makes up
        self._results = 0  # how many results the turn begins with

    def of(self, chat: JsonDict) -> list[JsonDict]:
        """The messages for a request. Raises BadRequest."""
        writers = {"user": self._write_user, "assistant": self._write_assistant, "tool": self._write_result}
        for place, message in taken_messages(chat.get("messages")):
            role = word(message.get("role"))
            given = {name: value for name, value in message.items() if value}
            self._draft.refuse_members(given, ("audio", "function_call"), place)
            self._draft.drop_rest(given, CHAT_MESSAGE_KNOWN, "messages")
            if role in ("system", "developer"):
                self._write_system(message, place)
            elif role in writers:
                writers[role](message, place)
            else:
                raise self._draft.refusal(f"{place}.role", f"the role {role}")
        self._write_later()
        if not self._messages:  # the system speaks alone, as in Dify's workflows: OpenAI takes that, and Claude doesn't
            self._say("user", self.system)
            self.system = []
        if not self._messages:
            raise BadRequest("messages: at least one message with content is required")
        self._strip_prefill()
        return self._messages

    def _say(self, role: str, blocks: list[JsonDict]) -> None:
        """Writes blocks of a role, into the same message while it lasts."""
        if self._messages and self._messages[-1]["role"] == role:
            self._messages[-1]["content"] += blocks
        elif blocks:
            self._messages.append({"role": role, "content": blocks})
            self._results = 0

    def _write_system(self, message: JsonDict, place: str) -> None:
        texts = with_cache_mark(self._blocks(message.get("content"), f"{place}.content"), message)
        if any(block["type"] != "text" for block in texts):
            raise self._draft.refusal(f"{place}.content", "what is no text, from the system,")
        if not self._messages or self._draft.settings.system_turns == "lead":
            self.system += texts
        else:
            self._later += texts

    def _write_later(self) -> None:
        """Writes what the system says later: where models know that, it stands behind a user's turn."""
        later, self._later = self._later, []
        if later and self._draft.settings.system_turns == "keep":
            self._messages.append({"role": "system", "content": later})
        elif later:
            self._say("user", [{**block, "text": reminder(block["text"])} for block in later])

    def _write_user(self, message: JsonDict, place: str) -> None:
        if self._draft.settings.system_turns == "user":
            self._write_later()
        self._say("user", with_cache_mark(self._blocks(message.get("content"), f"{place}.content"), message))

    def _write_assistant(self, message: JsonDict, place: str) -> None:
        """One turn: thinking that was handed back, then text, then calls."""
        self._write_later()
        if not self._messages or self._messages[-1]["role"] != "assistant":
            self._calls = {}  # some clients write each call into a turn of its own
        blocks = [
            handed_back(block)
            for _, block in objects(message.get("thinking_blocks") or [], f"{place}.thinking_blocks")
            if (block.get("type") == "thinking" and block.get("signature")) or block.get("type") == "redacted_thinking"
        ]
        for name in ("content", "refusal"):
            blocks += self._blocks(message.get(name), f"{place}.{name}")
        told = {block["id"]: block for block in blocks if block["type"] == "tool_use"}
        for at, entry in objects(message.get("tool_calls") or [], f"{place}.tool_calls"):
            call = self._call(entry, at)
            if call["id"] in told:  # LangChain sends them as parts, too, some of which lack the input
                told[call["id"]].update(call)
            else:
                blocks.append(call)
        self._say("assistant", with_cache_mark(blocks, message))

    def _call(self, call: JsonDict, place: str) -> JsonDict:
        function = member(call, "function")
        if call.get("type", "function") != "function":
            raise self._draft.refusal(place, f"a call of the type {word(call['type'])}")
        given = [string(function.pop("arguments", None) or "{}", f"{place}.function.arguments")]
        try:
            arguments = self._draft.read_inner(["{}"] if given == ["null"] else given)  # Go's empty map
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise self._draft.refusal(f"{place}.function.arguments", "what is no JSON object")
        name = self._draft.tool_name(text_in(function, "name", f"{place}.function"))
        id = self._call_id(carrying_id(call_name(call.get("id"), f"{place}.id")))
        return with_cache_mark([{"type": "tool_use", "id": id, "name": name, "input": arguments}], call)[0]

    def _call_id(self, id: str) -> str:
        """The id by which a call is sent: one that no other turn has, since Claude refuses that. Some servers count
        anew in each answer."""
        if id not in self._calls:
            sent = id
            while sent in self._call_ids:
                self._renamed += 1
                sent = f"{id[:CALL_ID_KEPT]}_{self._renamed}"
            self._call_ids.add(sent)
            self._calls[id] = sent
        return self._calls[id]

    def _write_result(self, message: JsonDict, place: str) -> None:
        call_id = carrying_id(call_name(message.get("tool_call_id"), f"{place}.tool_call_id"))
        if call_id not in self._calls:
            raise self._draft.refusal(f"{place}.tool_call_id", "a result without a call before it that has this id")
        result: JsonDict = {"type": "tool_result", "tool_use_id": self._calls[call_id]}
        content = message.get("content")
        blocks = self._blocks(content, f"{place}.content")
        if blocks:
            result["content"] = content if isinstance(content, str) else blocks
        with_cache_mark([result], message)
        if self._messages[-1]["role"] == "user":
            self._messages[-1]["content"].insert(self._results, result)
        else:
            self._say("user", [result])
        self._results += 1

    def _blocks(self, content: Any, place: str) -> list[JsonDict]:
        """The blocks of a content; texts without a character are left out, since Anthropic refuses them."""
        if isinstance(content, str):
            return [] if is_blank(content) else [text_part(content)]
        found = [self._block(part, at) for at, part in objects([] if content is None else content, place)]
        return [block for block in found if block["type"] != "text" or not is_blank(block["text"])]

    def _block(self, part: JsonDict, place: str) -> JsonDict:
        kind = word(part.get("type"))
        self._draft.drop_rest(part, (*PART_KNOWN, *OWN_KNOWN.get(kind, ())), "content")
        if kind in OWN_KNOWN:
            block = self._own_block(kind, part, place)
        elif kind in ("text", "refusal"):
            block = text_part(string(part.get(kind), f"{place}.{kind}"))
        elif kind == "image_url":
            self._draft.drop_rest(member(part, kind), ("url",), kind)
            block = self._image(string(member(part, kind).get("url"), f"{place}.image_url.url"), place)
        elif kind == "file":
            block = self._file(member(part, "file"), place)
        else:
            raise self._draft.refusal(place, f"a part of the type {kind}")
        return with_cache_mark([block], part)[0]

    def _own_block(self, kind: str, part: JsonDict, place: str) -> JsonDict:
        """A call, or its result, that is in the words of Messages already."""
        id_name = "id" if kind == "tool_use" else "tool_use_id"
        id = carrying_id(call_name(part.get(id_name), f"{place}.{id_name}"))
        if kind == "tool_use":
            if not isinstance(part.get("input"), dict):
                raise self._draft.refusal(f"{place}.input", "what is no object")
            name = self._draft.tool_name(text_in(part, "name", place))
            return {"type": kind, "id": self._call_id(id), "name": name, "input": part["input"]}
        content = self._blocks(part.get("content"), f"{place}.content")
        result = {"type": kind, "tool_use_id": self._calls.get(id, id), **({"content": content} if content else {})}
        return {**result, "is_error": True} if part.get("is_error") is True else result

    def _image(self, url: str, place: str) -> JsonDict:
        kind = DATA_URI.match(url, 0, DATA_URI_CHARACTERS)
        if not kind and url.startswith(("http://", "https://")):
            return {"type": "image", "source": {"type": "url", "url": url}}
        media = kind[1].lower().replace("/jpg", "/jpeg") if kind else ""  # OpenAI takes the one for the other
        if not kind or media not in IMAGE_TYPES:
            raise self._draft.refusal(place, "an image that is neither a URL nor JPEG, PNG, GIF or WebP in base64")
        source = {"type": "base64", "media_type": media, "data": url[kind.end() :]}
        return {"type": "image", "source": source}

    def _file(self, file: JsonDict, place: str) -> JsonDict:
        if "file_data" not in file:
            raise self._draft.refusal(place, "a file that isn't in the request")
        self._draft.drop_rest(file, ("file_data", "filename"), "file")
        data = string(file.pop("file_data"), f"{place}.file.file_data")
        kind = DATA_URI.match(data, 0, DATA_URI_CHARACTERS)
        if not kind and data.startswith("data:"):
            raise self._draft.refusal(place, "a file whose data isn't in base64")
        media, start = (kind[1].lower(), kind.end()) if kind else ("application/pdf", 0)
        if media == "application/pdf":
            source = {"type": "base64", "media_type": media, "data": data[start:]}
        else:  # JSON and many a program have types of their own, and are text all the same
            try:
                found = utf8_of_base64(data, start)
            except ValueError:
                if media.startswith("text/"):
                    raise BadRequest(f"{place}.file.file_data: Input should be base64 of UTF-8") from None
                raise self._draft.refusal(place, f"a file of the type {media}") from None
            del data, kind  # which holds it, too
            source = {"type": "text", "media_type": "text/plain", "data": found.decode("latin-1")}
        title = {"title": file["filename"]} if isinstance(file.get("filename"), str) else {}
        return {"type": "document", "source": source, **title}

    def _strip_prefill(self) -> None:
        """Takes the blanks off the end of an answer that Claude is to go on with: it refuses them."""
        final = self._messages[-1]["content"][-1]
        if self._messages[-1]["role"] == "assistant" and final["type"] == "text":
            final["text"] = without_final_blanks(final["text"])


# -- chat to Messages: the answer


class Call:
    """A call of a tool, as it comes in a chat answer."""

    def __init__(self) -> None:
        self.id = self.name = ""
        self.seal = ""  # what Gemini has to get back with it, or OpenRouter as a JSON object: 400 otherwise
        self.arguments = bytearray()  # what has come of its JSON
        self.whole = False  # whether that is all of an object: its brackets are closed
        self.sent = 0  # how much of it is written
        self.is_open = self.closed = False
        self._is_unsound = False  # whether nothing that may follow makes an object of the arguments
        self._is_object = False  # whether they have come as one, and not as text
        self._told = b""  # a digest of the arguments, when they are let go
        self._depth = 0  # how many brackets are open
        self._in_string = False
        self._rest = ""  # a backslash, if it came last

    def add(self, part: str, is_object: bool = False) -> None:
        """Takes what comes next of the arguments; `is_object`: as an object of which this is the text."""
        self._is_object = is_object and not self.arguments
        self.arguments += part.encode("latin-1")
        text = (self._rest + part).replace(r"\\", "")
        self._rest = "\\" if text.endswith("\\") else ""
        parts = text.replace('\\"', "").replace('""', "").split('"')
        outside = "".join(parts[self._in_string :: 2])
        self._in_string ^= len(parts) % 2 == 0
        opened = outside.count("{") + outside.count("[")
        closed = outside.count("}") + outside.count("]")
        self._depth += opened - closed
        if opened or closed:
            self.whole = self._depth <= 0

    def close(self) -> None:
        """Lets go of what was written."""
        self._told = hashlib.sha256(self.arguments).digest()
        self.arguments, self.seal, self.closed = bytearray(), "", True

    def was(self, name: str, arguments: str) -> bool:
        """Whether a whole call is this one once more."""
        if not self.whole or name != self.name:
            return False
        told = arguments.lstrip(JSON_BLANKS).encode("latin-1")
        return hashlib.sha256(told).digest() == self._told if self.closed else told == self.arguments

    @property
    def is_sound(self) -> bool:
        """Whether its arguments are a JSON object; none at all stand for an empty one. They are read only when they may
        be one: of an answer that was cut off and goes on, this is asked for each part of a call."""
        if self._is_object:
            return True
        if self._is_unsound or self._depth > 0 or self._in_string:
            return False
        try:
            found = READER.decode(self.arguments.decode("latin-1").strip(JSON_BLANKS) or "{}")
            self._is_unsound = not isinstance(found, dict)
        except (ValueError, RecursionError):
            self._is_unsound = True
        return not self._is_unsound


class MessageWriter:
    """Writes a message as the events of Messages: one block after another, counted from 0."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._events: list[JsonDict] = []
        self._thought = bytearray()  # what isn't shown of a block of thinking, and goes into its signature
        self.begun = False
        self.open = ""  # the type of the block that is open
        self.blocks = 0  # how many were begun

    def take(self) -> list[JsonDict]:
        """The events written since the last time."""
        events, self._events = self._events, []
        return events

    def begin(self) -> None:
        """Begins the message, unless it has begun. Its id is the request's: Ollama has a thousand ids, and Claude Code
        takes messages of the same id for parts of one."""
        if self.begun:
            return
        self.begun = True
        usage = message_usage(self._asked.input_tokens, 0, 0, 0)
        message = empty_message(answer_id("msg_", self._asked.id), narrow(self._asked.model), usage)
        self._events.append({"type": "message_start", "message": message})

    def write(self, kind: str, said: str) -> None:
        """Writes text or thinking, into a new block unless one of its type is open."""
        if self.open != kind:
            self._open({"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})})
        if kind == "text" or self._asked.thinking == "shown":
            self._delta({"type": f"{kind}_delta", kind: said})
        elif self._asked.thinking_returns and len(self._thought) <= TRANSLATED_HELD_BYTES:
            self._thought += said.encode("latin-1")

    def open_call(self, id: str, name: str) -> None:
        """Begins a call."""
        self._open({"type": "tool_use", "id": id, "name": self._asked.tool_name(name), "input": {}})

    def write_arguments(self, part: str) -> None:
        """Writes a part of the open call's arguments."""
        self._delta({"type": "input_json_delta", "partial_json": part})

    def close(self) -> None:
        """Ends the block that is open."""
        if self.open == "thinking":
            whole = self._thought if len(self._thought) <= TRANSLATED_HELD_BYTES else b""
            thought, self._thought = whole.decode("latin-1"), bytearray()
            self._delta({"type": "signature_delta", "signature": thinking_signature(self._asked.provider, thought)})
        if self.open:
            self._events.append({"type": "content_block_stop", "index": self.blocks - 1})
        self.open = ""

    def end(self, reason: str, sequence: Optional[str], usage: JsonDict) -> None:
        """Ends the message."""
        self.close()
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        self._events += [{"type": "message_delta", "delta": delta, "usage": usage}, {"type": "message_stop"}]

    def _open(self, block: JsonDict) -> None:
        self.close()
        self.open = block["type"]
        self._events.append({"type": "content_block_start", "index": self.blocks, "content_block": block})
        self.blocks += 1

    def _delta(self, delta: JsonDict) -> None:
        self._events.append({"type": "content_block_delta", "index": self.blocks - 1, "delta": delta})


THOUGHT_TEXTS = ("reasoning_content", "reasoning", "thinking")  # what servers call thinking
THOUGHT_MEMBERS = {*THOUGHT_TEXTS, "reasoning_details"}
ANSWER_MEMBERS = {"content", "refusal", "images", "tool_calls", "function_call", *THOUGHT_MEMBERS}
ANSWERED_MEDIA = ("image_url", "image", "output_image", "input_audio", "audio")  # that Messages has no place for
# What a chat answer ends for, in the words of Messages; any other word is an end like `stop`, but for those by which
# DeepSeek (the first), Z.ai (the second) and servers of open models say that it was broken off.
STOP_REASONS = {
    "length": "max_tokens", "max_tokens": "max_tokens", "model_length": "max_tokens",
    "repetition_truncation": "max_tokens",  # MiMo
    "model_context_window_exceeded": "model_context_window_exceeded", "sensitive": "refusal",  # both Z.ai
    "content_filter": "refusal", "refusal": "refusal",
}  # fmt: skip
BROKEN_OFF = (
    "insufficient_system_resource", "network_error", "abort", "aborted", "canceled", "cancelled", "interrupted",
    "timeout",
)  # fmt: skip
# By which Gemini (the first) and LiteLLM say that its model has malformed a call, which doesn't come.
FILTERED_CALL = ("function_call_filter", "malformed_function_call")


def answer_id(prefix: str, id: str) -> str:
    """An answer's id as the client's format has it."""
    tail = re.sub("^(?:msg_|chatcmpl-|req_)", "", id[:TOOL_ID_CHARACTERS])
    return prefix + re.sub("[^a-zA-Z0-9_-]", "-", tail)[:64]


def made_up_id(asked: Asked, number: int) -> str:
    """The id of a call that has none, by the number of calls before it: the client has to name it with its result."""
    digest = hashlib.sha256(f"{asked.id}\0{number}".encode("ascii")).hexdigest()
    return f"call_{digest[:24]}"


class ChatReader:
    """Reads a chat answer, chunk by chunk, into the events of a message.

    Servers differ. A call's `index` may be absent, always 0, or begin at 1: it is a name for the call and no position.
    Calls may come mixed: the first one is written as it comes, the others wait until it is whole. The usage may stand
    in a chunk of its own, in the last or in each; the end may be a finish_reason, [DONE], or both. Some in front of
    Gemini send a finish_reason with each chunk: an answer that goes on hasn't ended."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._writer = MessageWriter(asked)
        self._calls: list[Call] = []  # those that aren't written to their end, in their order; the first may be open
        self._named: dict[Any, Call] = {}  # the last one of each index
        self._ids: set[str] = set()
        self._seals: dict[str, str] = {}  # of calls that are still to come, by their id, if it was told
        self._count = 0  # of calls that have come,
        self._closed = 0  # and of those written
        self._parts = 0  # of calls, in the chunk that is being read
        self._held = 0  # bytes that are kept
        self._values = 0  # in the arguments of all calls
        self._later: list[tuple[str, list[str]]] = []  # what was said while a call was open, block by block
        self._blanks: list[str] = []  # text without a character so far, which may stand before nothing
        self._told: set[str] = set()  # the members of which parts have come
        self._said = 0  # characters, of all kinds
        self._over = False  # nothing more comes
        self._finish = self._sequence = ""
        self._may_go_on = False  # whether the answer has said so in a chunk that adds to it, as some do in each
        self.finishes_early = False  # whether it has gone on behind that
        self._has_begun = False  # whether a chunk with a choice has come before
        self._refused = False
        self._words = ""  # of a chunk without a choice or usage, unless the answer has gone on since
        self._tokens = NO_TOKENS  # that it has used, as far as it is told
        self.write: Callable[[Any], str] = dump  # makes text of arguments that come as a value

    @property
    def may_end(self) -> bool:
        """Whether the answer has said why it ends."""
        return bool(self._finish)

    @property
    def _is_cut_off(self) -> bool:
        """Whether the answer reached the limit of its length."""
        return STOP_REASONS.get(self._finish) in ("max_tokens", "model_context_window_exceeded")

    def begin(self) -> list[JsonDict]:
        """The first event, where the client is to have it before anything has come."""
        self._writer.begin()
        return self._writer.take()

    def read(self, chunk: JsonDict) -> tuple[list[JsonDict], bool]:
        """The events that a chunk adds, and whether it is known to be the last one. Raises AnswerFault."""
        if chunk.get("error"):
            raise fault_of(chunk)
        usage, choice = member(chunk, "usage"), first_choice(chunk)
        if choice is None and self._is_fault(chunk):
            raise fault_of(chunk)
        if choice is not None:
            self._words = ""
        elif not usage:
            self._words = words_of(chunk)[:ERROR_CHARACTERS] or self._words
        tokens = tokens_of(usage) if usage else NO_TOKENS  # LiteLLM may send an empty one in each chunk
        goes_on = choice is not None and self.may_end and self._goes_on(choice)
        self.finishes_early = self.finishes_early or goes_on
        ended = self.may_end and not goes_on and tokens is not NO_TOKENS
        if any(tokens) or (tokens is not NO_TOKENS and self._tokens is NO_TOKENS):
            self._tokens = tokens
        if choice is not None and (self.finishes_early or not self.may_end):
            self._parts = 0
            for each in first_choices(chunk) if "message" in choice else [choice]:
                self._read_choice(each)
        return self._writer.take(), ended

    def _is_fault(self, chunk: JsonDict) -> bool:
        """Whether a chunk without a choice tells of an error by another name than `error`; [DONE] may come behind it
        as if all were told."""
        if member(chunk, "base_resp").get("status_code"):  # MiniMax
            return True
        if chunk.get("error_message") and not self.may_end:  # DeepInfra, Venice
            return True
        if not self._writer.begun or self.may_end or "choices" in chunk:
            return False
        if chunk.get("error_code") or chunk.get("object") == "error":  # FastChat; older vLLM
            return True
        code = chunk.get("code")
        return isinstance(code, (int, str)) and bool(re.fullmatch("[45][0-9]{2}", str(code)) and words_of(chunk))

    def _goes_on(self, choice: JsonDict) -> bool:
        """Whether a choice goes on with an answer that has said why it ends. One that ended with its text may have
        calls of tools yet: LiteLLM and ChatMock tell of an end behind each part of an answer of Responses."""
        if self._may_go_on or self.finishes_early:
            return adds_to_answer(choice)
        known = {"", *self._ids, *(call.id for call in self._calls)}
        entries = listed_objects(member(choice, "delta").get("tool_calls"))[:TOOL_CALLS]
        return any(word(entry.get("id") or "") not in known for entry in entries)

    def end(self) -> list[JsonDict]:
        """The events that end the message. Raises AnswerFault."""
        if self._words and not self._finish:  # SiliconFlow's errors have a code of their own and a message
            raise AnswerFault(widened(self._words), text=widened(self._words))
        events, self._over = self.begin(), True
        self._advance(is_followed=True)
        if not (self._writer.blocks or self._blanks or self._finish):
            raise AnswerFault("the provider's answer ended before anything was said")
        if not self._writer.blocks:
            self._writer.write("text", "".join(self._blanks))
        reason = STOP_REASONS.get(self._finish) or ("tool_use" if self._closed else "end_turn")
        if self._refused:
            reason = "refusal"
        elif reason == "end_turn" and self._sequence:
            reason = "stop_sequence"
        self._writer.end(reason, self._sequence if reason == "stop_sequence" else None, self._final_usage())
        return events + self._writer.take()

    def _read_choice(self, choice: JsonDict) -> None:
        self._writer.begin()
        delta = self._part_of(choice)
        thought, said = reasoning_of(delta), answer_text(delta)
        if "reasoning_details" in delta:
            self._keep_seals(delta)
        if thought and self._asked.thinking != "hidden":
            self._say("thinking", thought)
        if said:
            self._say("text", said)
        if delta.get("refusal") and isinstance(delta["refusal"], str):
            self._refused = True
            self._say("text", delta["refusal"])
        entries = listed_objects(delta.get("tool_calls"))
        if entries:
            self._read_calls(entries, "message" in choice)
        if isinstance(delta.get("function_call"), dict):
            self._read_call({"index": "function_call", "function": delta["function_call"]})
        finish = ending_of(choice)
        if finish:
            self._finish, self._may_go_on = finish, adds_to_answer(choice)
            told = tokens_of(member(choice, "usage"))  # where Moonshot tells it
            self._tokens = self._tokens if told is NO_TOKENS else told
            says_nothing = not (self._has_begun or self._said or self._count)  # it may have the role alone
            self.finishes_early = self.finishes_early or says_nothing or bool(thought and not (said or entries))
            sequence = choice.get("stop_reason")
            self._sequence = sequence if isinstance(sequence, str) else ""
        self._has_begun = True

    def _part_of(self, choice: JsonDict) -> JsonDict:
        """What a choice adds. Of a whole message that is what no part has told: MiniMax sends one behind its parts.
        Raises AnswerFault."""
        part = member(choice, "delta")
        if part:
            if not self._told.issuperset(part):
                self._told.update(filter(part.get, ANSWER_MEMBERS & part.keys()))
            return part
        whole, told = member(choice, "message"), self._told
        check_media(whole)
        if told & THOUGHT_MEMBERS:
            told = told | THOUGHT_MEMBERS
        return {name: value for name, value in whole.items() if name not in told}

    def _say(self, kind: str, said: str) -> None:
        """Writes text or thinking, or keeps it: blank text until more follows, and any behind an unfinished call."""
        self._said += characters(said)
        if self._calls and all(call.whole for call in self._calls):
            self._advance(is_followed=True)
        if self._calls:
            # Some parsers of calls leak a newline; between words, blanks belong to them.
            if not is_blank(said) or (self._later and self._later[-1][0] == kind):
                self._say_later(kind, said)
        elif kind == "text" and self._writer.open != "text" and is_blank(said):
            self._hold(len(said) + WAITING_BYTES)
            self._blanks.append(said)
        else:
            blanks = self._take_blanks()
            self._writer.write(kind, "".join([*blanks, said] if kind == "text" else [said]))

    def _say_later(self, kind: str, said: str) -> None:
        """Keeps text or thinking that was said while a call is open. Raises AnswerFault."""
        self._hold(len(said) + WAITING_BYTES)
        if not self._later or self._later[-1][0] != kind:
            if len(self._later) >= EVENT_BLOCKS:  # all of them are written at once
                raise UnfitAnswer(f"more than {EVENT_BLOCKS} blocks of the provider's answer wait for their turn")
            self._later.append((kind, []))
        self._later[-1][1].append(said)

    def _take_blanks(self) -> list[str]:
        """The blank text that was kept, which is so no longer."""
        blanks, self._blanks = self._blanks, []
        self._held -= sum(len(blank) + WAITING_BYTES for blank in blanks)
        return blanks

    def _hold(self, size: int) -> None:
        """Takes room for what has to wait. Raises AnswerFault."""
        self._held += size
        if self._held > TRANSLATED_HELD_BYTES:
            raise UnfitAnswer(f"more than {TRANSLATED_HELD_BYTES} bytes of the provider's answer wait for their turn")

    def _read_calls(self, entries: list[JsonDict], are_whole: bool) -> None:
        """Takes parts of calls, or all of them. Raises AnswerFault."""
        self._parts += len(entries)
        if self._parts > TOOL_CALLS:
            raise too_many_calls()
        are_apart = are_whole or (len(entries) > 1 and not any("index" in one or one.get("id") for one in entries))
        for position, entry in enumerate(entries):
            self._read_call({**entry, "index": position} if are_apart else entry)

    def _keep_seals(self, delta: JsonDict) -> None:
        """Keeps what belongs to calls that come behind it, or in the same chunk."""
        for id, detail in sealed_calls(delta):
            if id in self._seals:
                continue
            seal = dump({name: detail[name] for name in SEAL_MEMBERS if isinstance(detail.get(name), (str, int))})
            if len(seal) <= SEAL_CHARACTERS:
                self._hold(len(id) + len(seal) + WAITING_BYTES)
                self._seals[id] = seal

    def _take_seal(self, id: str) -> str:
        """The seal that is kept for a call; one that named none is for the first."""
        key = id if id in self._seals else ""
        seal = self._seals.pop(key, "")
        self._held -= len(key) + len(seal) + WAITING_BYTES if seal else 0
        return seal

    def _read_call(self, entry: JsonDict) -> None:
        """Takes a part of a call. Raises AnswerFault."""
        function = member(entry, "function")
        id, name = (value if isinstance(value, str) else "" for value in (entry.get("id"), function.get("name")))
        given = function.get("arguments")
        part = given if isinstance(given, str) else "" if given is None else self.write(given)
        seal = member(member(entry, "extra_content"), "google").get("thought_signature")
        seal = seal if isinstance(seal, str) else self._take_seal(id) if id and self._seals else ""
        if len(id) > TOOL_ID_CHARACTERS or len(seal) > SEAL_CHARACTERS:
            raise UnfitAnswer("the provider's answer calls a tool by an id, or with a signature, that is too long")
        call = self._call_of(entry.get("index"), id, name, part)
        if name and id == call.id and call.was(name, part):
            return  # it comes once more
        part = part if call.arguments else first_of_arguments(part)
        known_before, call.id, call.seal = len(call.id) + len(call.seal), call.id or id, call.seal or seal
        if not call.is_open and not call.closed:
            call.name = call.name if call.name == name else (call.name + name)[: TOOL_NAME_CHARACTERS + 1]
        if call.closed:
            if part.strip():
                raise AnswerFault("the provider's answer adds to a call that was complete")
            return
        self._values += values_in(part)
        if self._values > TRANSLATED_VALUES:
            raise UnfitAnswer(f"the provider's answer calls tools with more than {TRANSLATED_VALUES} values")
        self._said += characters(part)
        self._hold(len(part) + len(call.id) + len(call.seal) - known_before)
        call.add(part, isinstance(given, dict))
        self._advance(is_followed=False)

    def _call_of(self, index: Any, id: str, name: str, part: str) -> Call:
        """The call that a part belongs to."""
        key = index if isinstance(index, (int, str)) else ("id", id) if id else "last"
        call = self._begun_call(key, id, name)
        if call is None or is_another(call, id, name, part):
            call = Call()
            self._count += 1
            if self._count > TOOL_CALLS:
                raise too_many_calls()
            self._hold(len(index) if isinstance(index, str) else 0)
            self._calls.append(call)
            self._named[key] = call
        self._named["last"] = call
        return call

    def _begun_call(self, key: Any, id: str, name: str) -> Optional[Call]:
        """The call that such a part goes on with, if it begins none."""
        if id and not name:  # several may be open by one index
            for call in self._calls:
                if call.id == id:
                    return call
        found, last = self._named.get(key), self._named.get("last")
        if found or not last or not last.name or id or name or last.whole:
            return found
        if isinstance(key, int) and len(self._named) < 3 * TOOL_CALLS:  # each part has an index of its own
            self._named[key] = last
        return last

    def _advance(self, is_followed: bool) -> None:
        """Writes what can be written of the calls: one is over when it is whole and something follows, or the answer is
        over. Raises AnswerFault."""
        while self._calls:
            call, is_followed = self._calls[0], is_followed or len(self._calls) > 1
            is_over = self._over or (is_followed and call.whole)
            if not call.is_open and not self._open(call, is_over):
                return
            if call.is_open and len(call.arguments) > call.sent:
                self._writer.write_arguments(call.arguments[call.sent :].decode("latin-1"))
                call.sent = len(call.arguments)
            if not is_over:
                return
            self._close(call)

    def _open(self, call: Call, is_over: bool) -> bool:
        """Begins to write a call as soon as enough of it is known; whether that is so. Raises AnswerFault."""
        if not is_over and not (call.name and call.id):
            return False
        if not call.name or len(call.name) > TOOL_NAME_CHARACTERS:
            raise UnfitAnswer("the provider's answer calls a tool without a name, or by one that is too long")
        if self._is_cut_off and not call.is_sound:
            return True  # nobody may execute it, and nothing of it was written
        id = call.id or made_up_id(self._asked, self._closed)
        # Some servers count anew in each answer, and Claude Code takes a call for the earlier one of its id.
        if is_among(self._asked.call_ids, hash(carrying_id(id, call.seal))):
            id += f"_{made_up_id(self._asked, self._closed)[-8:]}"
        while id in self._ids:
            id += "_2"
        self._ids.add(id)
        self._take_blanks()
        self._writer.open_call(carrying_id(id, call.seal), call.name)
        call.is_open = True
        return True

    def _close(self, call: Call) -> None:
        """Ends a call, and writes what was said meanwhile. Raises AnswerFault for arguments that nobody can execute,
        unless the answer was cut off."""
        if not call.is_sound and not self._is_cut_off:
            raise UnfitAnswer("the provider sent malformed tool arguments")
        self._writer.close()
        for kind, parts in self._later:
            self._writer.write(kind, "".join(parts))
            self._held -= sum(len(part) + WAITING_BYTES for part in parts)
        self._later = []
        self._calls.pop(0)
        self._closed += call.is_open
        self._held -= len(call.arguments) + len(call.seal)
        call.close()

    def _final_usage(self) -> JsonDict:
        """The usage in the terms of Messages, whose input leaves out what was read from a cache or written to it; an
        estimate where the provider tells none, since clients compact a conversation by it."""
        if self._tokens is NO_TOKENS:
            written = math.ceil(self._said * TOKENS_PER_CHARACTER)
            return message_usage(self._asked.input_tokens, 0, 0, written)
        fresh, read, brief, lasting, output = (count or 0 for count in self._tokens)
        stored = brief + lasting
        # Claude Code takes 0 for not told, and would count the cached part twice.
        return message_usage(fresh or min(1, read + stored), stored, read, output)


def first_of_arguments(part: str) -> str:
    """What comes first of a call's arguments, but for blanks, which alone would be no JSON. Some models write null for
    a tool without parameters."""
    part = part.lstrip(JSON_BLANKS)
    return "" if part.rstrip(JSON_BLANKS) == "null" else part


def is_among(numbers: Sequence[int], number: int) -> bool:
    """Whether it is one of these numbers, which are sorted."""
    place = bisect.bisect_left(numbers, number)
    return place < len(numbers) and numbers[place] == number


def is_another(call: Call, id: str, name: str, part: str) -> bool:
    """Whether a part that has the mark of this call begins another one. At Poolside, each part has another id."""
    begins = call.whole and bool(name and part.strip()) and not (id and call.was(name, part))
    goes_on = bool(call.name and part) and not (name or call.whole)
    return begins or bool(call.id and id and id != call.id and not goes_on)


def first_choices(answer: JsonDict) -> Iterator[JsonDict]:
    """The choices of a chat answer or a chunk that have the first index, or none: nobody has asked for others. Copilot
    tells the text of a whole answer in one, and its calls in the next."""
    first = (choice for choice in listed_objects(answer.get("choices")) if not choice.get("index"))
    return itertools.islice(first, 1 + TOOL_CALLS)


def first_choice(answer: JsonDict) -> Optional[JsonDict]:
    """The first choice of a chat answer or a chunk, if it has one."""
    return next(first_choices(answer), None)


def ending_of(choice: JsonDict) -> str:
    """The word for what ends the answer, if the choice has one: Gemini tells more behind a colon. Raises AnswerFault
    for an answer that isn't whole."""
    finish = choice.get("finish_reason")
    if not isinstance(finish, str) or finish in ("", "null"):
        return ""
    if finish == "error":
        raise fault_of(choice)
    ending = finish.partition(":")[0].lower()
    if ending in BROKEN_OFF:
        raise AnswerFault(f"the provider broke its answer off: {word(finish)}")
    if ending in FILTERED_CALL:
        raise UnfitAnswer(f"the provider's model sent a malformed call of a tool ({word(finish)})")
    return ending


def adds_to_answer(choice: JsonDict) -> bool:
    """Whether a choice of a chunk holds something of the answer."""
    delta = member(choice, "delta")
    return any(map(delta.get, ("content", "refusal", "tool_calls", "function_call"))) or reasoning_of(delta) != ""


def too_many_calls() -> UnfitAnswer:
    """The fault of an answer that calls more tools than clients may offer."""
    return UnfitAnswer(f"the provider's answer calls more than {TOOL_CALLS} tools")


def answer_text(delta: JsonDict) -> str:
    """The text in a delta. Raises AnswerFault for a picture or sound."""
    content = delta.get("content")
    if isinstance(content, str) and "images" not in delta:
        return content
    check_media(delta)
    return "".join(plain_texts(content))


def check_media(delta: JsonDict) -> None:
    """Raises AnswerFault for a picture or sound."""
    for part in listed_objects(delta.get("content")) + listed_objects(delta.get("images")):
        if part.get("type") in ANSWERED_MEDIA:
            raise UnfitAnswer(f"the provider's answer holds a part of the type {part['type']}, which isn't text")


def reasoning_of(delta: JsonDict) -> str:
    """The thinking in a delta, by the first of the names that servers have for it: others are copies."""
    for name in THOUGHT_TEXTS:
        said = delta.get(name)
        if said and isinstance(said, str):
            return said
    told = [entry.get("text") or entry.get("summary") for entry in listed_objects(delta.get("reasoning_details"))]
    for part in listed_objects(delta.get("content")):
        if part.get("type") == "thinking":
            told += plain_texts(part.get("thinking"))
    return "".join([said for said in told if isinstance(said, str)])


SEAL_MEMBERS = ("type", "data", "id", "format", "index")  # of an entry of `reasoning_details`


def sealed_calls(delta: JsonDict) -> Iterator[tuple[str, JsonDict]]:
    """What OpenRouter has to get back with calls of Gemini's, each with the id of its call, empty if it has none."""
    for detail in listed_objects(delta.get("reasoning_details")):
        if isinstance(detail.get("data"), str) and word(detail.get("format")).startswith("google-gemini"):
            yield word(detail.get("id") or ""), detail


def empty_message(id: str, model: str, usage: JsonDict) -> JsonDict:
    """A message of which nothing is said yet."""
    return {
        "id": id, "type": "message", "role": "assistant", "model": model, "content": [], "stop_reason": None,
        "stop_sequence": None, "usage": usage,
    }  # fmt: skip


def message_usage(fresh: int, stored: int, read: int, output: int) -> JsonDict:
    """The usage of a message."""
    return {
        "input_tokens": fresh, "cache_creation_input_tokens": stored, "cache_read_input_tokens": read,
        "output_tokens": output,
    }  # fmt: skip


GROWING = ("content", "text", "thinking", "reasoning_content", "signature", "refusal", "arguments", "partial_json")


def gather(whole: JsonDict, part: JsonDict) -> None:
    """Adds a part of an answer to what has come of it: texts grow, and entries of lists go by their `index`."""
    for name, value in part.items():
        if name in GROWING:
            if whole.get(name, [""]) == [""]:
                whole[name] = [value]  # one that comes at once is held once
            else:
                whole[name].append(value)
        elif isinstance(value, dict):
            gather(whole.setdefault(name, {}), value)
        elif isinstance(value, list):
            entries = whole.setdefault(name, [])
            for entry in value:
                if entry["index"] == len(entries):
                    entries.append({})
                gather(entries[entry["index"]], entry)
        elif name != "index":
            whole[name] = value


def gathered(whole: Any) -> Any:
    """What gather() has made of its parts, as an answer has it."""
    if isinstance(whole, dict):
        return {name: gathered(value) for name, value in whole.items()}
    if isinstance(whole, list):
        return "".join(whole) if isinstance(whole[0], str) else [gathered(entry) for entry in whole]
    return whole


def whole_message(events: Iterable[JsonDict]) -> JsonDict:
    """The message that the events tell of, without a call that was cut off."""
    message: JsonDict = {}
    blocks: list[JsonDict] = []
    for event in events:
        kind = event["type"]
        if kind == "message_start":
            message = event["message"]
        elif kind == "content_block_start":
            blocks.append({})
            gather(blocks[-1], event["content_block"])
        elif kind == "content_block_delta":
            gather(blocks[-1], {**event["delta"], "type": blocks[-1]["type"]})
        elif kind == "message_delta":
            message.update(event["delta"], usage=event["usage"])
    content = []
    for block in map(gathered, blocks):
        try:
            if block["type"] == "tool_use":
                block["input"] = read_within(block.pop("partial_json", "").strip(JSON_BLANKS) or "{}")
            content.append(block)
        except ValueError:
            pass  # a call that was cut off
    return {**message, "content": content or [text_part("")]}


# -- Messages to chat: the answer

FINISH_REASONS = {
    "max_tokens": "length", "model_context_window_exceeded": "length", "tool_use": "tool_calls",
    "refusal": "content_filter",
}  # fmt: skip
# Alibaba's server has OpenAI's names beside its own: by these its input includes what was read from the cache.
MESSAGE_FIGURES = (*ANTHROPIC_NAMES, *OPENAI_NAMES, "output_tokens_details")
FIGURES_WITHIN = 32  # counts that are kept of one of these that is an object; some have six
DELTAS = {
    "text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature",
    "input_json_delta": "partial_json",
}  # fmt: skip
CHAT_TIERS = {"standard": "default", "priority": "priority"}
PING: JsonDict = {"type": "ping"}


class BegunCall:
    """A call of a tool whose block has begun in a message."""

    def __init__(self, number: int, given: str) -> None:
        self.number = number  # of the calls before it
        self.given = given  # the input with which it began, as JSON
        self.has_arguments = False  # whether something of them has come


class MessageReader:
    """Reads the events of a message into the chunks of a chat answer. Blocks that chat doesn't know are left out: what
    tools at Anthropic have found stands in the text behind them."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._id = answer_id("chatcmpl-", asked.id)  # unless the message has one
        self._begun = False
        self._open: Optional[BegunCall] = None  # the call whose block began last, until it ends
        self._begun_calls: dict[Any, BegunCall] = {}  # those whose blocks haven't ended, by the index of the block
        self._calls = 0
        self._thoughts = 0  # blocks of thinking of which something has come
        self._is_new_thought = True  # whether what comes next of one is its first
        self._reason = ""
        self._refusal: Optional[str] = None
        self._usage: JsonDict = {}
        self._tier: JsonDict = {}  # by which the answer was served
        self.write: Callable[[Any], str] = dump  # makes text of the input of a call

    may_end = finishes_early = False  # only its last event ends a message

    def begin(self) -> list[JsonDict]:
        """The first chunk, where the client is to have it before anything has come."""
        if self._begun:
            return []
        self._begun = True
        return [self._chunk({"role": "assistant", "content": ""})]

    def read(self, event: JsonDict) -> tuple[list[JsonDict], bool]:
        """The chunks that an event adds, and whether it is the last one. Raises AnswerFault."""
        kind = event.get("type")
        if kind == "error" or event.get("error"):
            raise fault_of(event)
        if kind == "message":
            return self._read_whole(event), True
        if kind == "ping":
            return [PING], False
        if kind == "message_start":
            return self._read_head(member(event, "message")), False
        index = event["index"] if isinstance(event.get("index"), int) else None
        if kind == "content_block_start":
            return self.begin() + self._start(member(event, "content_block"), index), False
        if kind == "content_block_delta":
            return self._read_delta(member(event, "delta"), index), False
        if kind == "content_block_stop":
            return self._stop(index), False
        if kind in ("message_delta", "message_stop"):
            self._read_end(member(event, "delta"))
            self._count(event)
        return [], kind == "message_stop"

    def end(self) -> list[JsonDict]:
        """The chunks that end the answer. Raises AnswerFault where it isn't complete."""
        if self._open or not self._reason:
            raise AnswerFault("the provider's answer ended before it was finished")
        finish = FINISH_REASONS.get(self._reason, "stop")
        if finish in ("stop", "tool_calls"):  # vLLM and LiteLLM may say end_turn of a message that calls a tool
            finish = "tool_calls" if self._calls else "stop"
        delta = {"refusal": self._refusal} if self._refusal else {}
        unended = [chunk for call in self._begun_calls.values() for chunk in self._given(call)]
        chunks = [*self.begin(), *unended, self._chunk(delta, finish)]
        if self._asked.with_usage or not self._asked.stream:
            chunks.append({**self._chunk({}), "choices": [], "usage": self._final_usage()})
        return chunks

    def _read_head(self, message: JsonDict) -> list[JsonDict]:
        """The first chunk, by what a message tells before its content."""
        if message.get("id") and not self._begun:
            self._id = answer_id("chatcmpl-", word(message["id"]))
        self._count(message)
        return self.begin()

    def _read_whole(self, message: JsonDict) -> list[JsonDict]:
        """The chunks of a message that comes as a whole."""
        chunks = self._read_head(message)
        content = message.get("content")
        blocks = [text_part(content)] if isinstance(content, str) else listed_objects(content)
        if len(blocks) > WHOLE_BLOCKS:
            raise UnfitAnswer(f"the provider's answer has more than {WHOLE_BLOCKS} blocks")
        for block in blocks:
            chunks += self._start(block) + self._stop()
        self._read_end(message)
        return chunks

    def _read_end(self, delta: JsonDict) -> None:
        if "stop_reason" in delta:  # null: it just stopped
            self._reason = word(delta["stop_reason"] or self._reason or "end_turn")
        explanation = member(delta, "stop_details").get("explanation")
        self._refusal = explanation if isinstance(explanation, str) else self._refusal

    def _count(self, event: JsonDict) -> None:
        """Takes the figures of a usage: what isn't told again stays."""
        usage = member(event, "usage")
        tier = CHAT_TIERS.get(word(usage.get("service_tier")))
        self._tier = {"service_tier": tier} if tier else self._tier
        for name, figure in told_anew(usage, MESSAGE_FIGURES).items():
            if isinstance(figure, dict):  # which may be large, and is kept until the answer is over
                self._usage[name] = dict(itertools.islice(counts_of(figure).items(), FIGURES_WITHIN))
            elif isinstance(figure, (int, float)):
                self._usage[name] = figure

    def _start(self, block: JsonDict, index: Optional[int] = None) -> list[JsonDict]:
        kind, self._open = word(block.get("type")), None
        if kind == "tool_use":
            return self._start_call(block, index)
        self._is_new_thought |= kind in THINKING_BLOCKS
        if kind == "redacted_thinking" and isinstance(block.get("data"), str):
            return [self._thinking_chunk(type=kind, data=block["data"])]
        names = {"text": ("text",), "thinking": ("thinking", "signature")}.get(kind, ())
        deltas = ({"type": f"{name}_delta", name: block.get(name)} for name in names)
        return [chunk for delta in deltas for chunk in self._read_delta(delta)]

    def _start_call(self, block: JsonDict, index: Optional[int]) -> list[JsonDict]:
        id, name = (value if isinstance(value, str) else "" for value in (block.get("id"), block.get("name")))
        if self._calls >= TOOL_CALLS or len(name) > TOOL_NAME_CHARACTERS:
            raise UnfitAnswer("the provider's answer calls too many tools, or one by a name that is too long")
        if not name:
            raise UnfitAnswer("the provider's answer calls a tool without a name")
        if sum(len(call.given) for call in self._begun_calls.values()) > TRANSLATED_HELD_BYTES:
            raise UnfitAnswer(f"more than {TRANSLATED_HELD_BYTES} bytes of the provider's answer wait for their turn")
        unended = self._given(self._begun_calls.get(index))
        self._open = self._begun_calls[index] = BegunCall(self._calls, given_arguments(block.get("input"), self.write))
        self._calls += 1
        function = {"name": self._asked.tool_name(name), "arguments": ""}
        call_id, _ = carried_call(id)
        call_id = call_id or made_up_id(self._asked, self._open.number)
        call = {"index": self._open.number, "id": call_id, "type": "function", "function": function}
        return [*unended, self._chunk({"tool_calls": [call]})]

    def _read_delta(self, delta: JsonDict, index: Optional[int] = None) -> list[JsonDict]:
        kind = word(delta.get("type"))
        said = delta.get(DELTAS.get(kind, ""))
        if not said or not isinstance(said, str):
            return []
        if kind == "text_delta":
            return [self._chunk({"content": said})]
        if kind == "thinking_delta":
            return [self._thinking_chunk(said, type="thinking", thinking=said)]
        if kind == "signature_delta":
            # Claude wants the text back, too, and it is empty where it isn't shown, as by default since Opus 4.7.
            return [self._thinking_chunk(type="thinking", thinking="", signature=said)]
        call = self._begun_calls.get(index, self._open)
        said = said if call and call.has_arguments else said.lstrip(JSON_BLANKS)  # blanks alone would be no JSON
        return [self._arguments(call, said)] if call and said else []

    def _stop(self, index: Optional[int] = None) -> list[JsonDict]:
        call = self._begun_calls.pop(index, None)
        if not call and self._open and (index is None or self._open.has_arguments):
            call = self._open
        if call is self._open:
            self._open = None
        return self._given(call)

    def _given(self, call: Optional[BegunCall]) -> list[JsonDict]:
        """The arguments with which a call began, unless others have come; some servers don't tell that it ends."""
        return [self._arguments(call, call.given)] if call and not call.has_arguments else []

    def _arguments(self, call: BegunCall, part: str) -> JsonDict:
        call.has_arguments, call.given = True, ""
        return self._chunk({"tool_calls": [{"index": call.number, "function": {"arguments": part}}]})

    def _thinking_chunk(self, said: str = "", **block: Any) -> JsonDict:
        """A part of thinking: by DeepSeek's name for who shows it, in LiteLLM's form for who sends it back."""
        self._thoughts += self._is_new_thought
        self._is_new_thought = False
        # LiteLLM takes a chunk that has neither content nor this for an empty one.
        text = {"reasoning_content": said} if said or self._asked.stream else {}
        return self._chunk({**text, "thinking_blocks": [{"index": self._thoughts - 1, **block}]})

    def _chunk(self, delta: JsonDict, finish: Optional[str] = None) -> JsonDict:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        usage = {"usage": None} if self._asked.with_usage else {}
        return {
            "id": self._id, "object": "chat.completion.chunk", "created": self._asked.created,
            "model": narrow(self._asked.model), "choices": [choice], **self._tier, **usage,
        }  # fmt: skip

    def _final_usage(self) -> JsonDict:
        """The usage in the terms of chat, whose prompt holds what was read from a cache or written to it."""
        fresh, read, stored, _, output = (count or 0 for count in tokens_of(self._usage))
        prompt = fresh + read + stored
        thought = counts_of(self._usage.get("output_tokens_details")).get("thinking_tokens", 0)
        return {
            "prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": read, "cache_write_tokens": stored},
            "completion_tokens_details": {"reasoning_tokens": thought},
        }  # fmt: skip


def given_arguments(given: Any, write: Callable[[Any], str]) -> str:
    """The JSON of the input with which a call begins, as write() makes it; some servers send its text. Raises
    UnfitAnswer for what is no object."""
    text = given.strip(JSON_BLANKS) or "{}" if isinstance(given, str) else ""
    try:
        if isinstance(read_within(text) if text else given or {}, dict):
            return text or write(given or {})
    except (ValueError, RecursionError):
        pass
    raise UnfitAnswer("the provider sent malformed tool arguments")


def whole_chat(chunks: Iterable[JsonDict]) -> JsonDict:
    """The chat answer that the chunks are parts of."""
    last: JsonDict = {}
    whole: JsonDict = {}
    finish: Optional[str] = None
    for chunk in chunks:
        last = last if chunk is PING else chunk
        for choice in chunk.get("choices", ()):
            gather(whole, choice["delta"])
            finish = choice["finish_reason"]
    message = {"refusal": None, **gathered(whole)}
    message["content"] = message["content"] or (None if "tool_calls" in message else "")
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
    return {**last, "object": "chat.completion", "choices": [choice]}


# -- an answer in bytes


def named_error(data: bytes) -> bytes:
    """The data of an event that is called an error, as an object that says so, too."""
    if b'"error"' in data:
        return data
    is_object = data.lstrip()[:1] == b"{"
    return b'{"error":%b}' % (data if is_object else encoded(dump(narrow(data.decode("utf-8", "replace")))))


class EventReader:
    """Reads the data of the events of a stream, however it is cut."""

    # Of an event: the end of a line, and one without a character.
    _END = re.compile(rb"\n(?:\n|\r\n?)|\r(?:\r\n?|\n(?:\n|\r\n?))")
    # A stream may begin with a byte order mark.
    _DATA = re.compile(rb"(?:\A(?:\xef\xbb\xbf)?|[\r\n])data(?:: ?([^\r\n]*))?(?![^\r\n])")
    # One that its name alone calls an error: Alibaba's.
    _ERROR = re.compile(rb"(?:\A|[\r\n])event: ?error(?![^\r\n])")

    def __init__(self) -> None:
        self._rest = bytearray()  # what has come of an event that hasn't ended

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The data of each event that the next bytes complete. Raises AnswerFault for one that is too long."""
        seen, events = max(0, len(self._rest) - 3), []
        self._rest += data if self._rest else data.lstrip(b"\r\n")
        if self._END.search(self._rest, seen):
            *events, rest = self._END.split(self._rest)
            self._rest = bytearray(rest)
        for event in events:
            lines = self._DATA.findall(event)
            if lines:
                found = b"\n".join(lines)
                yield named_error(found) if b"error" in event and self._ERROR.search(event) else found
        if len(self._rest) > TRANSLATED_HELD_BYTES:
            raise UnfitAnswer(f"the provider sent an event of more than {TRANSLATED_HELD_BYTES} bytes")

    def flush(self) -> Iterator[bytes]:
        """The data of the event that the end of the stream ends; Gemini may end it by an error that is in none."""
        rest = bytes(self._rest).strip()
        if rest.startswith(b"[") and rest.endswith(b"]"):
            rest = rest[1:-1].strip()
        if rest.startswith(b"{") and rest.endswith(b"}"):
            yield rest
        else:
            yield from self.feed(b"\n\n")


class AnswerTranslator:
    """Translates one answer: a stream by feed(), ping() and close(), else whole(). `present` makes of a fault what the
    client may hear of it."""

    def __init__(self, asked: Asked, present: Callable[[AnswerFault], AnswerFault] = lambda fault: fault) -> None:
        self._asked = asked
        self._present = present
        self._events = EventReader()
        self._reader = ChatReader(asked) if asked.format == "anthropic" else MessageReader(asked)
        self.ended = False  # whether the client has all that it will get
        self.failed = False  # whether that ends with an error
        self.fault: Optional[AnswerFault] = None  # of the provider, if that is why

    @property
    def may_end(self) -> bool:
        """Whether nothing more is needed, though something may come."""
        return self._reader.may_end and not self._reader.finishes_early

    def feed(self, data: bytes) -> bytes:
        """The bytes for the client, of the next bytes of a stream."""
        return self._bytes_of_all(self._read_events(self._events.feed(data)))

    def close(self, is_cut: bool = False) -> bytes:
        """The bytes for the client at the end of a stream; `is_cut`: its framing isn't complete, or was reset."""
        return self._bytes_of_all(self._read_end(is_cut))

    def ping(self) -> bytes:
        """What goes out when nothing has come for a while: a sign of life, or the end of an answer that may end."""
        return self.close() if self.may_end else self._bytes_of_all([*self._reader.begin(), PING])

    def fail(self, message: str, kind: str, code: str) -> bytes:
        """The error event that ends a stream."""
        self.ended = self.failed = True
        return error_event(self._asked.format, kind, message, code, self._asked.id)

    def whole(self, body: bytes, is_stream: bool) -> bytes:
        """What the client gets for an answer that has come as a whole, in the form it asked for. Raises AnswerFault."""
        if is_stream and body.count(b"data:") > WHOLE_EVENTS:
            raise UnfitAnswer(f"the provider streamed an answer of more than {WHOLE_EVENTS} events")
        if is_stream and body.count(b"\n") + body.count(b"\r") > WHOLE_LINES:
            raise UnfitAnswer(f"the provider streamed an answer of more than {WHOLE_LINES} lines")
        if self._asked.stream and body.count(b"\xc2\x85") > WHOLE_EVENTS:  # each goes out as six bytes, or twelve
            raise UnfitAnswer(f"the provider's answer has the character U+0085 more than {WHOLE_EVENTS} times")
        parts = (body[at : at + TRANSLATED_AT_ONCE_BYTES] for at in range(0, len(body), TRANSLATED_AT_ONCE_BYTES))
        data = itertools.chain.from_iterable(map(self._events.feed, parts))
        self._reader.write = dumped_in_parts
        read = itertools.chain(self._read_events(data), self._read_end())
        events = read if is_stream else self._read_whole(body)
        try:
            if self._asked.stream:
                return self._in_events(events, is_stream)
            pieces = json_pieces(whole_message(events) if self._asked.format == "anthropic" else whole_chat(events))
        except (AnswerFault, RecursionError) as error:
            raise self._fault_of(error) from None
        return b"".join(pieces)

    def _in_events(self, events: Iterable[JsonDict], are_short: bool) -> bytes:
        """The events of an answer that has come as a whole, as they go out. Raises AnswerFault."""
        pieces, size = [], 0
        for event in events:
            for piece in self._pieces_of(event, are_short):
                pieces.append(piece)
                size += len(piece)
            if size > WRITTEN_ANSWER_BYTES:
                raise UnfitAnswer(
                    f"the provider's answer is over {WRITTEN_ANSWER_BYTES} bytes in events of the client's"
                )
        return b"".join([*pieces, self._last_line()])

    def _bytes_of_all(self, events: Iterable[JsonDict]) -> bytes:
        """The events as they go out, with what tells of a fault among them."""
        sent = []
        try:
            for event in events:
                sent.append(self._bytes_of(event))
            return b"".join(sent) + (self._last_line() if self.ended else b"")
        except (AnswerFault, RecursionError) as error:
            # With the tracebacks of what led to it, it and this frame would keep each other.
            fault = self.fault = self._fault_of(error).with_traceback(None)
            fault.__context__ = None
            _, kind, message, code = error_terms(self._asked, fault)
            return b"".join(sent) + self.fail(message, kind, code if fault.text else fault.code)

    def _fault_of(self, error: Exception) -> AnswerFault:
        """What the client hears of a fault, or of an answer that is nested too deeply to be written again."""
        nested = AnswerFault("the provider's answer is nested too deeply")
        return self._present(error if isinstance(error, AnswerFault) else nested)

    def _bytes_of(self, event: JsonDict) -> bytes:
        if self._asked.format == "anthropic":
            return on_one_line(encoded(f"event: {event['type']}\ndata: {dump(event)}\n\n"))
        return b": ping\n\n" if event is PING else on_one_line(encoded(f"data: {dump(event)}\n\n"))

    def _pieces_of(self, event: JsonDict, is_short: bool) -> list[bytes]:
        """An event as it goes out, which is taken apart unless it is short."""
        if is_short or event is PING:
            return [self._bytes_of(event)]
        before = f"event: {event['type']}\ndata: " if self._asked.format == "anthropic" else "data: "
        return [before.encode("ascii"), *map(on_one_line, json_pieces(event)), b"\n\n"]

    def _last_line(self) -> bytes:
        return b"" if self._asked.format == "anthropic" else b"data: [DONE]\n\n"

    def _read_events(self, events: Iterable[bytes]) -> Iterator[JsonDict]:
        """The client's events for those of the provider's stream. Raises AnswerFault."""
        for data in filter(bytes.strip, events):  # some keep the connection alive by an event without data
            if self.ended:
                return
            is_last = data.strip() == b"[DONE]"
            if not is_last:
                found, is_last = self._reader.read(read_event(data))
                yield from found
            if is_last:
                self.ended = True
                yield from self._reader.end()

    def _read_end(self, is_cut: bool = False) -> Iterator[JsonDict]:
        """The client's events for the end of the stream. Raises AnswerFault unless the answer is complete."""
        yield from self._read_events(self._events.flush())
        if self.ended:
            return
        if not self._reader.may_end or (is_cut and self._reader.finishes_early):
            raise AnswerFault("the provider's stream ended before it was finished")
        self.ended = True
        yield from self._reader.end()

    def _read_whole(self, body: bytes) -> Iterator[JsonDict]:
        """The client's events for a whole answer. Raises AnswerFault."""
        answer = read_answer(body)
        found, _ = self._reader.read(answer)
        if not found:
            raise wordless_fault(answer)
        if is_unfinished(answer):
            raise AnswerFault("the provider's answer ended before it was finished")
        self.ended = True
        del answer
        yield from found
        yield from self._reader.end()


def is_unfinished(answer: JsonDict) -> bool:
    """Whether a whole chat answer says by a null that nothing has ended it. Some servers say so of all that calls
    tools; whether that is whole, the calls tell."""
    choice = first_choice(answer) or {}
    message = member(choice, "message")
    return choice.get("finish_reason", "") is None and not (message.get("tool_calls") or message.get("function_call"))


def read_answer(data: bytes, reader: Optional[json.JSONDecoder] = None) -> JsonDict:
    """A document of an answer. Raises AnswerFault for what is none, or would take `json` too long."""
    try:
        may_be_many = len(data) > TRANSLATED_VALUES
        values = sum(map(data.count, (b",", b"[", b"{"))) if may_be_many else 0
        return read_document([data], values, "replace", reader)
    except RecursionError:
        raise UnfitAnswer("the provider's answer is nested too deeply to be translated") from None
    except BadRequest:
        raise AnswerFault("the provider sent what is no JSON object, or one of too many values") from None


def event_reader() -> json.JSONDecoder:
    """A reader for one event. It raises UnfitAnswer for more than EVENT_FRACTIONS numbers, of which long ones count as
    several."""
    counted = 0

    def read(digits: str) -> float:
        nonlocal counted
        counted += 1 if len(digits) <= FRACTION_DIGITS else len(digits) // 10
        if counted > EVENT_FRACTIONS:
            raise UnfitAnswer(f"the provider sent an event of more than {EVENT_FRACTIONS} numbers with a fraction")
        return finite(digits)

    return json.JSONDecoder(parse_int=short_integer, parse_float=read, parse_constant=refuse_constant)


ESCAPED_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # of a surrogate pair


def parts_in(data: bytes) -> int:
    """How many lists and objects a JSON text has, and twice its strings: what a string says counts for its brackets
    only, since its own quotation marks are escaped, for each U+0085, which goes out as six bytes, and twice for each
    escaped half of a surrogate pair, which takes 0.5 µs to write, of a thought twice."""
    plain = data.replace(b"\\\\", b"")  # a backslash may be escaped itself
    strings = plain.count(b'"') - plain.count(b'\\"')
    escaped = data.count(b"\xc2\x85") + 2 * len(ESCAPED_HALF.findall(plain))
    return data.count(b"[") + data.count(b"{") + strings + escaped


def read_event(data: bytes) -> JsonDict:
    """The document of an event of a stream. Raises AnswerFault for what is none, or would take long."""
    values = data.count(b",")
    if values > EVENT_VALUES:
        raise UnfitAnswer(f"the provider sent an event of more than {EVENT_VALUES} values")
    if len(data) > EVENT_PARTS and parts_in(data) > EVENT_PARTS:
        raise UnfitAnswer(f"the provider sent an event of more than {EVENT_PARTS} lists, objects and strings")
    event = read_answer(data, event_reader() if len(data) > EVENT_FRACTIONS else None)
    if len(listed_objects(event.get("content"))) > EVENT_BLOCKS:
        raise UnfitAnswer(f"the provider sent a message of more than {EVENT_BLOCKS} blocks in one event")
    return event


# -- errors

ERROR_CHARACTERS = 4096  # of a provider's words are told
ERROR_LEVELS = 6  # of objects and lists in which they are looked for; the usual ones have up to 4
STATUS_KINDS = {
    401: "authentication_error", 402: "billing_error", 403: "permission_error", 404: "not_found_error",
    408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
    504: "timeout_error", 529: "overloaded_error",
}  # fmt: skip
OPENAI_KINDS = {402: "insufficient_quota", 503: "server_error", 529: "server_error"}  # where OpenAI has another word
CODES = {404: "model_not_found", 429: "rate_limit_exceeded", 503: "overloaded", 529: "overloaded"}  # of OpenAI
# How providers say that a request is longer than the model can read, each in its own words; collected by pi-mono.
OVERFLOW = re.compile(
    r"""(?ix) context[_\ ]length[_\ ]exceeded | exceed_context_size_error | tokens_limit_reached | max_seq_len
    | context\ window\ exceeds | maximum\ context\ length | context\ length\ (?:is|of)\ only | configured\ context\ size
    | exceed(?:s|ed)?\ (?:the\ |this\ )?(?:model(?:'s)?\ )?(?:(?:max|maximum|available)\ )?context
    | exceeds\ (?:the\ )?maximum\ (?:number\ of\ tokens | (?:allowed\ )?input\ length)
    | exceeds?\ the\ (?:model's\ )?limit\ of\ [0-9]+ | maximum\ prompt\ length
    | reduce\ the\ length\ of\ the\ (?:messages|input)
    | too\ large\ for\ model\ with | greater\ than\ the\ context\ length | exceeded\ model\ token\ limit
    | longer\ than\ the\ (?:model's\ context|maximum\ model)\ length | prompt\ (?:is\ )?too\ long
    | input\ is\ too\ long\ for | prompt\ exceeds\ max\ length | range\ of\ input\ length | too\ many\ tokens:
    | exceed\ max\ message\ tokens | context\ size\ has\ been\ exceeded | `inputs`\ (?:tokens\ \+|must\ have\ less)
    | input\ token\ count\ is\ [0-9]"""
)
# A limit of tokens a minute that one request alone is over: no waiting helps. Groq tells it with a 413, or a 429.
NEVER_FITS = re.compile(r"(?i)request too large for model.{0,300}limit ([0-9,]{1,15}), requested ([0-9,]{1,15})")
OVERFLOW_LIMIT = re.compile(
    r"""(?ix) (?: maximum\ (?:context|prompt)\ length\ (?:is|of) | context\ length\ (?:is|of)\ only
    | number\ of\ tokens\ allowed | too\ large\ for\ model\ with | exceeds\ the\ limit\ of | available\ context\ size
    | model\ token\ limit | model's\ (?:maximum\ )?context\ length | maximum\ (?:model|allowed\ input)\ length\ of
    | configured\ context\ size\ is | max_seq_len | n_ctx"? | must\ be\ <= | must\ have\ less\ than | supports\ up\ to
    | > ) [:\ (]* ([0-9,]{1,15})"""
)
OVERFLOW_INPUT = re.compile(
    r"""(?ix) ([0-9,]{1,15}) (?: \ in\ the\ messages | \ input\ tokens | \ tokens\ from\ the\ input | \ tokens\ >
    | \ tokens\)\ is\ longer | \ of\ text\ input (?: ,\ ([0-9,]{1,15})\ of\ tool\ input)?)
    | (?: resulted\ in | token\ count \ ?\( | count\ of | contains(?:\ at\ least)? | request\ \( | requested:
    | prompt\ \(length | prompt\ has | input\ length\ \(? | keep\ the\ first | prompt_tokens\ \( | n_prompt_tokens"?:
    | given: | token\ count\ is)
    \ ? ([0-9,]{1,15})"""
)
OVERFLOW_OUTPUT = re.compile(
    r"""(?ix) ([0-9,]{1,15}) \ (?: in\ the\ (?:completion|output) | (?:tokens\ )?for\ the\ completion | output\ tokens
      | `max_new_tokens`)
    | is\ too\ large: \ ? ([0-9,]{1,15})"""
)
# How providers name the longest answer that a model gives, to a request for a longer one: OpenAI; Alibaba, DeepSeek,
# Groq, Novita, Volcengine, Ollama's cloud and Anthropic; Bedrock. A limit of one or two digits is another member's.
OUTPUT_LIMIT = re.compile(
    r"""(?ix) supports\ at\ most\ ([0-9,]{1,15})\ completion\ tokens
    | max_(?:completion_)?tokens .{0,120}? (?: \[[01],\ ? | less\ than\ or\ equal\ to\ `? | between\ [01]\ and\ \ ?
      | maximum\ output\ tokens\ \( | value\ <=\ | :\ [0-9]{1,15}\ >\ ) ([0-9,]{3,15})
    | maximum\ tokens\ you\ requested\ exceeds\ the\ model\ limit\ of\ ([0-9,]{1,15})"""
)
# How templates of models, and mistral-common, refuse what the system says later in a conversation; llama.cpp and Ollama
# with a 500.
SYSTEM_TURN = re.compile(
    "(?i)system message must be at the beginning|unexpected role 'system' after role|conversation roles must alternate"
)
# How providers say that a model doesn't take a part of the request, by the name by which Claude Code then goes on
# without it; otherwise each turn of the conversation would fail the same way. It looks for `capability_rejected: NAME`
# since 2.1.228.
REFUSALS = {
    "effort_unsupported": re.compile("(?i)reasoning[_ .]?effort|thinking_config|support (?:thinking|reasoning)"),
    "structured_outputs_unsupported": re.compile("(?i)response_format|json_schema|structured.?output"),
    "document_block": re.compile(
        r"(?i)`file`|or 'image_url'|supports? .{0,20}(?:file|document|pdf)|content.{0,12}must be a string|content\.type"
    ),
    "image_block": re.compile(
        r"""(?ix) `image_url` | image\ input | supports?\ .{0,20}(?:image|vision) | multi-?modal
        | content.{0,12}must\ be\ a\ string | content\.type | at\ most\ [0-9]+\ image | too\ many\ images"""
    ),
}
REFUSED_MEMBERS = {"effort_unsupported": "reasoning_effort", "structured_outputs_unsupported": "response_format"}
# What OpenRouter says with a 404, llama.cpp and Ollama with a 500.
NO_IMAGES = re.compile("(?i)support image input|image input is not supported|required for image input")


def fault_of_status(status: int, content: bytes, provider: str) -> AnswerFault:
    """What a provider's response tells that has the status of an error."""
    words = error_words(content) or f"HTTP {status} from the provider {provider}"
    return AnswerFault(words, status, content[:ERROR_BYTES].decode("utf-8", "replace"))


def first_fault(content: bytes, is_stream: bool) -> Optional[AnswerFault]:
    """The error with which a stream begins, or that a whole answer is; None where it isn't one. Errors are short."""
    content = content[:PEEKED_BYTES]
    if (b"error" if is_stream else b'"error"') not in content:
        return None
    try:
        events = EventReader()
        found = filter(bytes.strip, itertools.chain(events.feed(content), events.flush()))
        document = read_answer(next(found, b"{}") if is_stream else content)
        failed = failed_part(document)
        return fault_of(failed) if failed else None
    except (AnswerFault, RecursionError):
        return None  # which is told when it is translated


def failed_part(document: JsonDict) -> Optional[JsonDict]:
    """What tells of an error in a whole answer or a chunk of chat: it, or a choice in it; None where nothing does."""
    if document.get("error") or (document.get("error_message") and not document.get("choices")):
        return document
    choices = listed_objects(document.get("choices"))
    return next((choice for choice in choices if choice.get("finish_reason") == "error"), None)


def error_terms(asked: Asked, fault: AnswerFault) -> tuple[int, str, str, str]:
    """Status, type, message and code by which the client acts rightly."""
    format, status, message, text = asked.format, fault.status, fault.message, fault.text
    refused = refused_part(asked, fault)
    overflows = status in (400, 413, 422) and OVERFLOW.search(text)
    overflows = overflows or (status in (413, 429) and NEVER_FITS.search(text))
    longest = figure_in(OUTPUT_LIMIT, message) if asked.max_tokens and status in (400, 422) else 0
    if overflows or (status == 413 and not text):  # Cerebras says nothing
        status, code = 400, "context_length_exceeded"
        message = overflow_message(message, text) if format == "anthropic" else message
    elif 0 < longest < asked.max_tokens:
        status, code, message = 400, "", shorter_answer(asked.input_tokens, asked.max_tokens, longest, message)
    elif asked.system_speaks and status in (400, 422, 500) and SYSTEM_TURN.search(text):
        # the words by which Claude Code says it as the user, from then on
        status, code, message = 400, "", f"role 'system' is not supported within messages ({message})"
    elif refused:
        status, code, message = 400, "", f"{message} capability_rejected: {refused}"
    else:
        code = CODES.get(status, "")
    kind = STATUS_KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    if format == "openai":
        kind = OPENAI_KINDS.get(status, "server_error" if kind == "api_error" else kind)
    return status, kind, message, code or kind


def refused_part(asked: Asked, fault: AnswerFault) -> str:
    """Which of REFUSALS a provider's error is; empty if none."""
    if fault.status in (400, 422):
        return next((name for name in asked.refusable if REFUSALS[name].search(fault.message)), "")
    is_about_images = fault.status in (404, 500) and "image_block" in asked.refusable
    return "image_block" if is_about_images and NO_IMAGES.search(fault.message) else ""


def overflow_message(message: str, text: str) -> str:
    """A context overflow in the words by which Claude Code compacts the conversation, or asks for a shorter answer."""
    never = NEVER_FITS.search(text)
    limit, given, output = (figure_in(pattern, text) for pattern in (OVERFLOW_LIMIT, OVERFLOW_INPUT, OVERFLOW_OUTPUT))
    if never:
        limit, given = map(number_of, never.groups())
    if limit and given and output and given <= limit:
        return shorter_answer(given, output, limit - given, message)
    figures = f": {given} tokens > {limit} maximum" if limit and given else ""
    return f"prompt is too long{figures} ({message}) capability_rejected: prompt_too_long"


def shorter_answer(given: int, output: int, longest: int, message: str) -> str:
    """The words by which Claude Code asks again for an answer that is no longer than the longest one possible."""
    return (
        f"input length and `max_tokens` exceed context limit: {given} + {output} > {given + longest}, decrease input "
        f"length or `max_tokens` and try again ({message})"
    )


def figure_in(pattern: re.Pattern[str], text: str) -> int:
    """The number that a pattern finds, or the sum of several, else 0."""
    match = pattern.search(text)
    return sum(map(number_of, filter(None, match.groups()))) if match else 0


def number_of(digits: str) -> int:
    """The number that is written so, maybe with commas within it or behind it."""
    return int(digits.replace(",", "") or 0)


def error_words(content: bytes) -> str:
    """What a provider's error says, wherever it says it; empty for a page of HTML."""
    if BEGINS_EVENT.match(content, 0, PEEKED_BYTES):  # LiteLLM's, where it was to begin a stream
        content = next(EventReader().feed(content[:PEEKED_BYTES] + b"\n\n"), content)
    text = content[:ERROR_CHARACTERS].decode("utf-8", "replace").strip()
    if text.startswith("<"):
        return ""
    try:
        return words_of(json.loads(content[:PEEKED_BYTES]))[:ERROR_CHARACTERS] or text
    except (ValueError, RecursionError):
        return text


def words_of(document: Any, levels: int = ERROR_LEVELS) -> str:
    """The message of an error, looked for in so many levels; the reason behind it too, where OpenRouter has put it."""
    if isinstance(document, list) and levels:
        items = (item for item in document[:DROPPED_NAMES] if not isinstance(item, list))
        return "; ".join(filter(None, [words_of(item, levels - 1) for item in items]))
    if not (isinstance(document, dict) and levels):
        return document if isinstance(document, str) else ""
    error = document.get("error")
    found = words_of(error, levels - 1) if error else ""
    for name in ("message", "detail", "errors", "msg", "error_msg", "error_message", "base_resp", "status_msg"):
        found = found or words_of(document.get(name), levels - 1)
    where = document.get("loc")
    if isinstance(where, list):
        steps = [str(step) for step in where[:DROPPED_NAMES] if isinstance(step, (str, int))]
        found = f"{'.'.join(steps)}: {found}" if steps else found
    raw = member(document, "metadata").get("raw")
    return f"{found}: {raw}" if isinstance(raw, str) else found


# What stands in the type of an error that has no status, and which one it means.
FAULT_WORDS = {
    "overloaded": 529, "rate_limit": 429, "Throttling": 429, "invalid_request": 400, "BadRequest": 400, "context": 400,
    "timeout": 504,
}  # fmt: skip


def fault_of(document: JsonDict) -> AnswerFault:
    """The error that an answer tells of in its midst."""
    error = document.get("error")
    told = error if isinstance(error, dict) else document
    figures = [told.get(name) for name in ("code", "status", "status_code")]
    kind = word(told.get("type") or told.get("error_type") or told.get("code"))
    figures += [meant for mark, meant in FAULT_WORDS.items() if mark in kind]
    numbers = [figure for figure in figures if isinstance(figure, (int, str))]  # LiteLLM's are texts
    status = next((int(number) for number in numbers if re.fullmatch("[45][0-9]{2}", str(number))), 502)
    if status != 429 and OVERFLOW.search(beginning(told)):
        status = 400  # whatever else it says, or doesn't
    words = words_of(document) or "the provider's answer holds an error"
    text = widened(beginning(document))
    return AnswerFault(widened(words[:ERROR_CHARACTERS]), status, text)


def wordless_fault(answer: JsonDict) -> AnswerFault:
    """The fault of an answer without a message, with what it says instead: some errors have the status 200."""
    problem = "the provider's answer holds no message"
    if not words_of(answer):
        return AnswerFault(problem)
    fault = fault_of(answer)
    return AnswerFault(f"{problem}: {fault.message}", fault.status, fault.text)


def beginning(document: JsonDict) -> str:
    """The first ERROR_BYTES characters of a document as JSON text; no more of it than that is written."""
    found = ""
    for part in in_parts([document], members_of):
        found += part
        if len(found) >= ERROR_BYTES:
            break
    return found[:ERROR_BYTES]


# ==== Records =======================================================================================
#
# What is told of each request: one line, whatever becomes of it. It holds no header values and nothing of a body, and
# what a client chose (names, paths) can neither break the line nor fill the log. And what is counted of all requests to
# models: a Tally holds the sums from which the metrics, the page and, without a ledger, the accounts are made. Clients
# invent names, so it tells a bounded number of them apart.


def new_request_id() -> str:
    """An id like those of both APIs; it is no secret."""
    return f"req_{random.getrandbits(96):024x}"


class AccessRecord:
    """The facts of one request for its line of the log and its row of the ledger."""

    def __init__(self, when: float, started: float) -> None:
        self.when = when  # seconds since 1970
        self.started = started  # on the monotonic clock, like first_byte
        self.first_byte: Optional[float] = None
        self.request_id = new_request_id()
        self.client = self.caller = self.method = self.path = self.model = self.sent_model = ""
        self.other_model = ""  # that a server may take: the last one behind a form's file, or one beside the body
        self.provider = self.key = self.error = ""
        self.upstream_id = ""  # the provider's own id of the request
        self.tried = ""  # what each failed attempt met
        self.translated = self.dropped = ""  # between which formats, and what was left out
        self.status = self.bytes_sent = self.attempts = 0
        self.is_stream = self.complete = False  # complete: the whole response went out
        self.usage = Usage()
        self.used = NOTHING_TOLD  # when the response has ended
        self.cost: Optional[int] = None  # in 10^-9 USD, if there is a price

    def row(self, now: float, clock: float) -> LedgerRow:
        """The record as a row of the ledger. `now` is on the monotonic clock, `clock` in seconds since 1970."""
        used = self.used
        return LedgerRow(
            int(clock * 1000), self.request_id, self.caller, self.model, self.sent_model, self.provider, self.key,
            self.path, self.status, int(self.is_stream), self.attempts,
            None if self.first_byte is None else int((self.first_byte - self.started) * 1000),
            int((now - self.started) * 1000), used.input, used.cache_read, used.cache_write, used.cache_write_long,
            used.output, used.tier or None, self.cost, int(self.complete), self.error or None, self.tried or None,
        )  # fmt: skip

    def line(self, now: float, style: str, is_brief: bool = False) -> str:
        """The record as a line of the log, key=value or JSON; what isn't known is left out. Times are in seconds. It
        has less than LOG_LINE_BYTES: within a longer one, another worker's line might come to stand."""
        whole = int(self.when)
        clock = f"{utc_time(whole)}.{int((self.when - whole) * 1000):03}Z"
        names: Sequence[str] = (
            self.client, self.caller, self.method, self.path, self.model, self.sent_model, self.provider, self.key,
        )  # fmt: skip
        last: Sequence[str] = (self.upstream_id, self.translated, self.dropped, self.tried, self.error)
        if is_brief:
            names, last = [*map(brief, names)], [*map(brief, last)]
        figures = self._figures(now)
        if style == "json":
            numbers = {name: json.loads(figure) for name, figure in (pair.split("=") for pair in figures.split())}
            opening = {"time": clock, "level": "info", "id": self.request_id}
            line = log_json({**opening, **dict(zip(NAMED, names)), **numbers, **dict(zip(TOLD_LAST, last))})
        else:
            told = "".join([f" {name}={log_text(value)}" for name, value in zip(TOLD_LAST, last) if value])
            line = f"time={clock} id={self.request_id}{log_names(*names)}{figures}{told}"
        return line if is_brief or len(line) < LOG_LINE_BYTES else self.line(now, style, is_brief=True)

    def _figures(self, now: float) -> str:
        """The numbers that are known, as they stand in a line."""
        figures = f" status={self.status} bytes={self.bytes_sent}"
        if self.first_byte is not None:
            figures += f" ttfb={self.first_byte - self.started:.4f}"
        figures += f" duration={now - self.started:.4f}"
        if self.attempts:
            figures += f" attempts={self.attempts}"
        used = self.used
        if used.input is not None:
            figures += f" input={used.input}"
        if used.cache_read:
            figures += f" cache_read={used.cache_read}"
        if used.cache_write:
            figures += f" cache_write={used.cache_write}"
        if used.cache_write_long:
            figures += f" cache_write_long={used.cache_write_long}"
        if used.output is not None:
            figures += f" output={used.output}"
        if self.cost is not None:
            figures += f" cost={self.cost / 10**9:.9f}"
        return figures


@functools.lru_cache(maxsize=4)
def utc_time(seconds: int) -> str:
    """The time in ISO 8601 without its zone."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


TOLD_LAST = ("upstream_id", "translated", "dropped", "tried", "error")
NAMED = ("client", "caller", "method", "path", "model", "sent", "provider", "key")
PLAIN_VALUE = re.compile(r"[!#-<>-\[\]-~]*")  # printable ASCII but space, quote, = and backslash


# The same values come again and again, and AccessRecord keeps them short: without this cache and that of utc_time(), a
# request costs 6% more instructions.
@functools.lru_cache(maxsize=256)
def log_names(*values: str) -> str:
    """Who asked for what and where it went, as a part of a line."""
    return "".join([f" {name}={log_text(value)}" for name, value in zip(NAMED, values) if value])


def log_json(values: Mapping[str, Any]) -> str:
    """The values that are known as a line of JSON."""
    known = {name: value for name, value in values.items() if value != ""}
    return json.dumps({name: shortened(value) if isinstance(value, str) else value for name, value in known.items()})


def log_text(value: str) -> str:
    """Text that can't break its line or its field: cut when long, quoted and escaped where it isn't plain."""
    is_plain = len(value) <= LOG_VALUE_CHARACTERS and PLAIN_VALUE.fullmatch(value)
    return value if is_plain else json.dumps(shortened(value))


def shortened(value: str) -> str:
    """Text cut when it is long, without the one control character that JSON would leave."""
    if len(value) > LOG_VALUE_CHARACTERS:
        value = f"{value[:LOG_VALUE_CHARACTERS]}..."
    return value.replace("\x7f", "\\x7f")


def brief(value: str) -> str:
    """Text that is cut short where its JSON would be long: an escaped character may take 12 bytes."""
    value = shortened(value)
    return value if len(json.dumps(value)) <= LOG_VALUE_BYTES else f"{value[: LOG_VALUE_BYTES // 12]}..."


# -- what is counted

# Of a model at a provider: the SUMS, how many had a price, then how many had their first byte, and their end, within
# each of these limits, in seconds: OpenTelemetry's powers of two, carried on, since requests may last for minutes.
TTFB_LIMITS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, math.inf)
DURATION_LIMITS = (*(0.08 * 2**power for power in range(14)), math.inf)
PRICED = len(SUMS)
TTFB_AT = PRICED + 1
DURATION_AT = TTFB_AT + len(TTFB_LIMITS)
SERIES_LENGTH = DURATION_AT + len(DURATION_LIMITS)


def sums_of(series: Sequence[int]) -> Sums:
    """The SUMS of a series, its cost only where there was a price."""
    sums: Sums = list(series[: len(SUMS)])
    sums[COST] = series[COST] if series[PRICED] else None
    return sums


def status_label(status: int) -> str:
    """A status as metrics tell it: of one that nobody has defined, its class, such as 5xx."""
    is_defined = status in http.client.responses or status in RETRIED_STATUSES or not status
    return str(status) if is_defined else f"{status // 100}xx"


def is_odd_name(name: str) -> bool:
    """Whether a name would take too much room in what the workers show one another, or isn't Unicode."""
    return len(json.dumps(name)) > TALLIED_NAME_BYTES or name != name.encode("utf-8", "replace").decode("utf-8")


def add_to(sums: list[int], figures: Iterable[int]) -> None:
    """Adds the figures to the sums, one by one."""
    sums[:] = map(operator.add, sums, figures)


Names = TypeVar("Names")


def bounded_sums(table: dict[Names, list[int]], name: Names, other: Names, length: int) -> list[int]:
    """The sums of a name in a table; of `other` where it is new and the table has TALLIED_SERIES."""
    sums = table.get(name)
    if sums is None:
        sums = table.setdefault(name if len(table) < TALLIED_SERIES else other, [0] * length)
    return sums


class Tally:
    """What was counted since the start, by one process or by several together. What clients can name is bounded."""

    def __init__(self, since: float) -> None:
        self.since = since  # seconds since 1970
        # By user, model as sent, provider and key: SUMS, and how many had a price. These are the product of all names,
        # and soon too many; so what metrics tell apart is counted apart, too.
        self.series: dict[tuple[str, str, str, str], list[int]] = {}
        self.of_users: dict[str, list[int]] = {}  # the same
        self.of_models: dict[tuple[str, str], list[int]] = {}  # by provider and model: the same, and within the limits
        self.hours: dict[tuple[int, str], list[int]] = {}  # by clock hour and user: SUMS
        self._last_hour = 0  # of them
        self._full_hour = 0  # whose users alone take all the room
        self.seconds: dict[int, list[int]] = {}  # of the last minute: requests and errors
        self.statuses: collections.Counter[tuple[str, str, str]] = collections.Counter()  # provider, model, status
        self.refused: collections.Counter[str] = collections.Counter()  # codes of the relay's own errors
        self.ended: collections.deque[LedgerRow] = collections.deque(maxlen=ENDED_ROWS)
        self.users: Collection[str] = ()  # those of relay.json, which are always told apart,
        self.models: Collection[str] = ()  # and so are these
        self._models: dict[str, str] = {}  # others that a provider has answered for, and who asked for them first
        self._others: set[str] = set()  # users whom only their tokens name

    def add(self, *rows: LedgerRow) -> None:
        """Counts requests to models that have ended. Those that differ only in their figures are counted together."""
        alike: dict[tuple[Any, ...], list[LedgerRow]] = {}
        for row in rows:
            names = (row.at // 1000, row.user, row.sent, row.model, row.provider, row.key, row.status)
            alike.setdefault(names, []).append(row)
        for together in alike.values():
            self._count(together)
        self.ended.extend(rows)

    def _count(self, rows: Sequence[LedgerRow]) -> None:
        """Counts rows of one second, user, model, provider, key and status."""
        first, figures = rows[0], figures_of(rows)
        model, user = self._model_label(first), self._user_label(first.user)
        self._count_status(first.provider, model, status_label(first.status), len(rows))
        counts = [*figures, sum([row.cost is not None for row in rows])]
        add_to(self._in_series((user, model, first.provider, first.key)), counts)
        add_to(self._of_user(user), counts)
        sums = self._of_model(first.provider, model)
        sums[:TTFB_AT] = map(operator.add, sums, counts)
        for row in rows:
            if row.stream and row.ttfb is not None:
                sums[TTFB_AT + bisect.bisect_left(TTFB_LIMITS, row.ttfb / 1000)] += 1
            sums[DURATION_AT + bisect.bisect_left(DURATION_LIMITS, row.duration / 1000)] += 1
        add_to(self._in_hour(first.at // 3_600_000, user), figures)
        add_to(self._in_second(first.at // 1000), figures[:2])

    def _count_status(self, provider: str, model: str, status: str, count: int) -> None:
        is_full = len(self.statuses) >= TALLIED_SERIES and (provider, model, status) not in self.statuses
        self.statuses[provider, OTHER if is_full else model, status] += count

    def _in_series(self, names: tuple[str, str, str, str]) -> list[int]:
        return bounded_sums(self.series, names, (OTHER, OTHER, OTHER, OTHER), TTFB_AT)

    def _of_user(self, user: str) -> list[int]:
        return bounded_sums(self.of_users, user, OTHER, TTFB_AT)

    def _of_model(self, provider: str, model: str) -> list[int]:
        return bounded_sums(self.of_models, (provider, model), (provider, OTHER), SERIES_LENGTH)

    def _in_hour(self, hour: int, user: str) -> list[int]:
        sums = self.hours.get((hour, user))
        if sums is None:
            if hour > self._last_hour:  # not for each user: there may be a thousand
                self._last_hour = hour
                self.hours = {name: self.hours[name] for name in self.hours if name[0] > hour - TALLIED_HOURS}
            if len(self.hours) >= TALLIED_SERIES and hour == self._last_hour > self._full_hour:
                self._merge_oldest_hour()
            sums = bounded_sums(self.hours, (hour, user), (hour, OTHER), len(SUMS))
        return sums

    def _merge_oldest_hour(self) -> None:
        """Makes room: the users of the oldest hour before the last one are told apart no more."""
        oldest = min((hour for hour, user in self.hours if user != OTHER), default=self._last_hour)
        if oldest >= self._last_hour:
            self._full_hour = self._last_hour
        else:
            merged = self.hours.setdefault((oldest, OTHER), [0] * len(SUMS))
            for name in [name for name in self.hours if name[0] == oldest and name[1] != OTHER]:
                add_to(merged, self.hours.pop(name))

    def _in_second(self, second: int) -> list[int]:
        counts = self.seconds.get(second)
        if counts is None:
            self.seconds = {known: self.seconds[known] for known in self.seconds if known > second - 60}
            counts = self.seconds[second] = [0, 0]
        return counts

    def _model_label(self, row: LedgerRow) -> str:
        """The model as it was sent, else as it was asked for; OTHER until a provider has answered for it, and where its
        user has had many such names: clients invent them."""
        name = row.sent or row.model
        if name not in self._models and name not in self.models:
            is_full = len(self._models) >= TALLIED_MODELS
            if not row.answered or is_full or is_odd_name(name) or self._has_named_many(row.user):
                return OTHER
            self._models[name] = row.user
        return name

    def _has_named_many(self, user: str) -> bool:
        return list(self._models.values()).count(user) >= TALLIED_MODELS_OF_ONE

    def _user_label(self, user: str) -> str:
        if user not in self.users and user not in self._others:
            if len(self._others) >= TALLIED_USERS or is_odd_name(user):
                return OTHER
            self._others.add(user)
        return user

    def shared(self) -> JsonDict:
        """All of it, for the other workers."""
        return {
            "since": self.since,
            "series": [[*names, *sums] for names, sums in self.series.items()],
            "users": [[user, *sums] for user, sums in self.of_users.items()],
            "models": [[*names, *sums] for names, sums in self.of_models.items()],
            "hours": [[*names, *figures] for names, figures in self.hours.items()],
            "seconds": [[second, *counts] for second, counts in self.seconds.items()],
            "statuses": [[*names, count] for names, count in self.statuses.items()],
            "refused": [[code, count] for code, count in self.refused.items()],
            "ended": list(self.ended),
        }

    def include(self, shared: JsonDict) -> None:
        """Adds what another process has counted."""
        self.since = min(self.since, shared["since"])
        for provider, model, status, count in shared["statuses"]:
            self._count_status(provider, model, status, count)
        for code, count in shared["refused"]:
            self.refused[code] += count
        for user, model, provider, key, *figures in shared["series"]:
            add_to(self._in_series((user, model, provider, key)), figures)
        for user, *figures in shared["users"]:
            add_to(self._of_user(user), figures)
        for provider, model, *figures in shared["models"]:
            add_to(self._of_model(provider, model), figures)
        for hour, user, *figures in shared["hours"]:
            add_to(self._in_hour(hour, user), figures)
        for second, *figures in shared["seconds"]:
            add_to(self._in_second(second), figures)
        rows = sorted([*self.ended, *(LedgerRow(*row) for row in shared["ended"])], key=lambda row: row.at)
        self.ended = collections.deque(rows, maxlen=ENDED_ROWS)

    def by(self, *columns: int, user: Optional[str] = None) -> dict[tuple[str, ...], list[int]]:
        """What was counted, SUMS and how many had a price, by some of GROUPS; of one user, or all."""
        found: dict[tuple[str, ...], list[int]] = {}
        for names, sums in self._narrowest({*columns} if user is None else {*columns, USER}):
            if user in (None, names[USER]):
                add_to(found.setdefault(tuple(names[column] for column in columns), [0] * TTFB_AT), sums)
        return found

    def _narrowest(self, columns: set[int]) -> Iterator[tuple[tuple[str, str, str, str], list[int]]]:
        """The sums, by GROUPS, of the table with the fewest names that tells these apart."""
        if columns <= {USER}:
            return (((user, "", "", ""), sums) for user, sums in self.of_users.items())
        if USER not in columns and KEY not in columns:
            return ((("", model, provider, ""), sums) for (provider, model), sums in self.of_models.items())
        return iter(self.series.items())


# -- the page

RUNNING_USER, RUNNING_SINCE = 1, 7  # where these stand in a row of a request that runs


def ended_row(row: LedgerRow) -> list[Any]:
    """A request that has ended, as the page gets it: first its row_number(); times are in seconds."""
    written = None if row.cache_write is None else row.cache_write + (row.cache_write_long or 0)
    return [
        row_number(row), row.at / 1000, row.user, row.model, row.sent, row.provider, row.key, row.status,
        None if row.ttfb is None else row.ttfb / 1000, row.duration / 1000, row.input, row.cache_read, row.output,
        row.cost, written, row.attempts, row.tried or "", row.error or "", row.path, row.stream, row.complete,
        row.request, row.tier,
    ]  # fmt: skip


def row_number(row: LedgerRow) -> int:
    """A number for a row that isn't in the ledger: larger than that of one that ended before, and hardly ever twice."""
    return row.at * 4096 + zlib.crc32(row.request.encode()) % 4096


# -- the metrics

Sample = tuple[str, Mapping[str, str], float]  # what stands behind the name of its family, labels, value
Family = tuple[str, str, str, Iterable[Sample]]  # name, type, meaning
Labelled = Iterable[tuple[Mapping[str, str], Sequence[int]]]  # labels, and what was counted of what has them


def metrics_text(tally: Tally, keys: Sequence[JsonDict], gauges: Mapping[str, float]) -> Iterator[str]:
    """All that is counted in Prometheus' text format 0.0.4, in pieces of METRIC_LINES lines at most: a family of many
    models takes 50 ms (https://prometheus.io/docs/instrumenting/exposition_formats/). `keys`: as the page has them."""
    for name, kind, meaning, samples in metric_families(tally, keys, gauges):
        lines = [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
        for suffix, labels, value in samples:
            if len(lines) >= METRIC_LINES:
                yield "\n".join([*lines, ""])
                lines = []
            pairs = ",".join([f'{label}="{label_text(text)}"' for label, text in labels.items()])
            lines.append(f"{name}{suffix}{{{pairs}}} {value!r}" if pairs else f"{name}{suffix} {value!r}")
        yield "\n".join([*lines, ""])


def metric_families(tally: Tally, keys: Sequence[JsonDict], gauges: Mapping[str, float]) -> Iterator[Family]:
    """All metrics."""
    yield from request_families(tally)
    yield from key_families(keys)
    refused = [("", {"code": code}, count) for code, count in tally.refused.items()]
    yield "monorelay_refused_total", "counter", "The relay's own errors by x-monorelay-error.", refused
    for name, value in gauges.items():
        kind = "counter" if name.endswith("_total") else "gauge"
        yield name, kind, GAUGES[name], [("", {}, value)]
    yield "monorelay_build_info", "gauge", "The version that runs.", [("", {"version": __version__}, 1)]


def request_families(tally: Tally) -> Iterator[Family]:
    """What was counted of requests to models."""
    models = [({"provider": provider, "model": model}, sums) for (provider, model), sums in tally.of_models.items()]
    users = [({"user": user}, sums) for user, sums in tally.of_users.items()]
    providers = [({"provider": provider}, sums) for (provider,), sums in tally.by(PROVIDER).items()]
    statuses = [
        ("", {"provider": provider, "model": model, "status": status}, count)
        for (provider, model, status), count in tally.statuses.items()
    ]
    times = "monorelay_request_duration_seconds", "monorelay_time_to_first_byte_seconds"
    yield "monorelay_requests_total", "counter", "Requests to models, by the status that the client got.", statuses
    yield times[0], "histogram", "How long requests to models took.", histogram(models, DURATION_AT, DURATION_LIMITS)
    yield times[1], "histogram", "How long it took until their first byte.", histogram(models, TTFB_AT, TTFB_LIMITS)
    yield "monorelay_tokens_total", "counter", "Tokens by kind; the kinds are disjoint.", token_samples(models)
    yield "monorelay_cost_usd_total", "counter", "What they cost, as far as there are prices.", cost_samples(models)
    untold = [("", labels, sums[SUMS.index("untold")]) for labels, sums in providers]
    yield "monorelay_untold_usage_total", "counter", "Answers that didn't tell what they used.", untold
    requests = [("", labels, sums[SUMS.index("requests")]) for labels, sums in users]
    yield "monorelay_user_requests_total", "counter", "Requests to models by user.", requests
    yield "monorelay_user_tokens_total", "counter", "Tokens by user and kind.", token_samples(users)
    yield "monorelay_user_cost_usd_total", "counter", "Cost by user.", cost_samples(users)


def key_families(keys: Sequence[JsonDict]) -> Iterator[Family]:
    """How the keys fare, as the page has them."""
    named = [({"provider": key["provider"], "key": key["key"]}, key) for key in keys]
    attempts = [
        ("", {**labels, "outcome": outcome}, count)
        for labels, key in named
        for outcome, count in key["outcomes"].items()
    ]
    cooling = [("", labels, int(key["state"] == "cooling")) for labels, key in named]
    remaining = [
        ("", {**labels, "limit": limit["limit"]}, round(1 - limit["used"], 6))
        for labels, key in named
        for limit in key["limits"]
    ]
    yield "monorelay_upstream_attempts_total", "counter", "Attempts by what they met.", attempts
    yield "monorelay_key_cooling", "gauge", "Whether a key comes last since it failed.", cooling
    yield "monorelay_key_remaining_ratio", "gauge", "What is left of the provider's limit for a key.", remaining


GAUGES = {
    "monorelay_requests_running": "Requests whose response isn't all sent.",
    "monorelay_connections_open": "Connections of clients.",
    "monorelay_log_lines_dropped_total": "Lines of the log that were dropped: it wasn't taken, or couldn't be written.",
    "monorelay_ledger_rows_dropped_total": "Rows of the ledger that were dropped, since it couldn't be written.",
    "monorelay_ledger_rows_waiting": "Rows of the ledger that aren't written yet.",
    "process_start_time_seconds": "When the relay was started, in seconds since 1970.",
}


def token_samples(series: Labelled) -> list[Sample]:
    """Tokens by their kinds."""
    return [("", {**labels, "kind": kind}, sums[SUMS.index(kind)]) for labels, sums in series for kind in KINDS]


def cost_samples(series: Labelled) -> list[Sample]:
    """Costs in USD."""
    return [("", labels, sums[COST] / 10**9) for labels, sums in series]


def histogram(series: Labelled, start: int, limits: Sequence[float]) -> Iterator[Sample]:
    """The samples of a histogram whose counts begin at `start`; their sum in seconds stands among the SUMS. Those of
    one series are of one moment, however slowly they are taken."""
    total = SUMS.index("duration") if start == DURATION_AT else SUMS.index("ttfb")
    for labels, sums in series:
        counts, seconds = list(itertools.accumulate(sums[start : start + len(limits)])), sums[total] / 1000
        for limit, count in zip(limits, counts):
            yield "_bucket", {**labels, "le": "+Inf" if limit == math.inf else f"{limit:g}"}, count
        yield "_sum", labels, seconds
        yield "_count", labels, counts[-1]


def label_text(text: str) -> str:
    """Text as the value of a label; half a surrogate pair, which UTF-8 doesn't have, as it is written in Python."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


# ==== Echo ==========================================================================================
#
# A provider that is built in: it answers without any network, so that a newcomer sees the relay work before
# there is a key, and clients can be tried against errors and cut streams. It speaks Anthropic's format, and all of
# OpenAI's but chats, which are translated for it. Its response follows from the request alone; here it is only
# composed. The upstream room sends it over HTTP, so that it takes the very path that a provider's takes.
#
#   echo            the last user text comes back, word by word when streaming
#   echo-slow       at 20 words a second
#   echo-cut        breaks off in the middle
#   echo-tool       calls the first tool offered, then echoes the tool's result
#   echo-error-N    answers with the HTTP status N, 400 to 599

ECHO_WORD_SECONDS = 0.05
ECHO_STOPS, ECHO_STOP_CHARACTERS = 16, 256
ECHO_INPUTS = 2048  # OpenAI's limit for embeddings
ECHO_NUMBERS = 2**18  # in all vectors of a response
ECHO_HALVES = 30_000  # of surrogate pairs, in a text: CPython takes up to 0.8 µs to read each from UTF-8
WORD = re.compile(r"\s*\S+", re.ASCII)
WORD_IN_UTF_8 = re.compile(rb"\s*\S+")
BLANK = re.compile(r"\s", re.ASCII)
ECHO_COUNTED_CHARACTERS = 16 * 1024  # at a time, which takes 1 ms
WORD_MARKS = bytes(ord(" ") if chr(byte) in BLANK_CHARACTERS else ord("w") for byte in range(256))
ECHO_CREATED = "2025-01-01T00:00:00Z"
ECHO_CREATED_UNIX = 1735689600


class EchoFault(Exception):
    """An error that echo finds in a request, or that the model's name asks for."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class EchoResponse(NamedTuple):
    """A response in parts, each made and sent after a pause. A cut one ends too early."""

    status: int
    content_type: str
    parts: Iterable[bytes]
    size: Optional[int] = None  # of all parts, where it is known beforehand
    cut: bool = False
    pause: float = 0.0  # seconds


class Reply(NamedTuple):
    """What echo says, in neither format yet."""

    id: str
    model: str
    thinking: str
    text: str
    tool: str  # the name of a tool to call, or empty
    tool_input: JsonDict
    stop_reason: str
    stop_sequence: Optional[str]
    input_tokens: int

    @property
    def output_tokens(self) -> int:
        return count_words([self.text, self.thinking, self.tool_input]) + (1 if self.tool else 0)


def echo_response(
    method: str, path: str, body: bytes, now: float, request_id: str, betas: Sequence[str] = ()
) -> EchoResponse:
    """The response to a request in either format; `path` tells which. `betas` are those of anthropic-beta."""
    try:
        if method == "GET":
            return echo_models(path)
        compose = ECHO_ENDPOINTS.get(path) if method == "POST" else None
        if not compose:
            raise EchoFault(404, f"the echo provider has no {method} {path}")
        if sum(map(body.count, (b"[", b"{", b","))) > ECHO_VALUES:
            raise EchoFault(400, f"echo reads at most {ECHO_VALUES} values")
        try:
            request = json.loads(body, parse_float=fraction_reader())
        except (ValueError, RecursionError):
            raise EchoFault(400, "the request body is not valid JSON") from None
        if not isinstance(request, dict):
            raise EchoFault(400, "the request body must be a JSON object")
        require(request, "model", is_text, "Input should be a valid string")
        asked_error(request["model"])
        try:
            request["betas"] = betas  # as the SDKs call them
            if has_beta(request, "mid-conversation-"):
                request["messages"] = without_system_turns(request.get("messages"))
            return compose(request, hashlib.sha256(body).hexdigest()[:24], int(now))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError):
            raise EchoFault(400, "a field of the request has the wrong type") from None
    except EchoFault as fault:
        return echo_error(path, fault, request_id)


def fraction_reader() -> Callable[[str], float]:
    """A `parse_float` for one request. It raises EchoFault for more than ECHO_FRACTIONS numbers."""
    numbers = itertools.count(1)

    def read(digits: str) -> float:
        if next(numbers) > ECHO_FRACTIONS:
            raise EchoFault(400, f"echo reads at most {ECHO_FRACTIONS} numbers with a fraction")
        return float(digits)

    return read


def echo_error(path: str, fault: EchoFault, request_id: str) -> EchoResponse:
    """The response that tells what is wrong, in the format of the path."""
    format = "anthropic" if path.startswith(("/v1/messages", "/v1/anthropic")) else "openai"
    usual = "api_error" if fault.status >= 500 else "invalid_request_error"
    kind = STATUS_KINDS.get(fault.status, usual)
    document = error_body(format, kind, str(fault), kind, request_id)
    return EchoResponse(fault.status, "application/json", [document], len(document))


def has_beta(request: JsonDict, name: str) -> bool:
    """Whether a request names a version of this beta; `name` is how all versions begin."""
    return any(beta.startswith(name) for beta in request["betas"])


def without_system_turns(messages: Any) -> Any:
    """The turns but those of the system, which Claude Code puts between the others where a beta allows it."""
    if not isinstance(messages, list):
        return messages
    return [turn for turn in messages if not (isinstance(turn, dict) and turn.get("role") == "system")]


def asked_error(model: str) -> None:
    """Raises the error that a model's name asks for."""
    match = re.fullmatch(r"echo-error-([0-9]+)", model)
    if match:
        status = int(match[1][:4])
        if not 400 <= status <= 599:
            raise EchoFault(400, "model: echo-error-N takes a status from 400 to 599")
        raise EchoFault(status, "Overloaded" if status == 529 else f"the error {status} that {model} was asked for")


def echo_models(path: str) -> EchoResponse:
    """The list of models, or one of them; an object that suits both formats."""
    entries = [
        {"type": "model", "id": name, "display_name": name, "created_at": ECHO_CREATED,
         "object": "model", "created": ECHO_CREATED_UNIX, "owned_by": "monorelay"}
        for name in ECHO_MODELS
    ]  # fmt: skip
    if path == "/v1/models":
        ends = {"first_id": ECHO_MODELS[0], "last_id": ECHO_MODELS[-1]}
        return echo_json({"object": "list", "data": entries, "has_more": False, **ends})
    for entry in entries:
        if path == f"/v1/models/{entry['id']}":
            return echo_json(entry)
    raise EchoFault(404, f"the echo provider has no GET {path}")


def echo_json(document: Any, cut: bool = False) -> EchoResponse:
    """The document as a whole response, or half of it."""
    body = echo_text(document)
    return EchoResponse(200, "application/json", [body[: len(body) // 2] if cut else body], len(body), cut)


def echo_text(document: Any) -> bytes:
    """The document as JSON on one line, in UTF-8: escapes for all but ASCII would make it three times as long."""
    return on_one_line(json.dumps(document, ensure_ascii=False).encode("utf-8", "backslashreplace"))


# -- what both formats check and say


def of_type(*types: type) -> Callable[[Any], bool]:
    """A condition: the value is of one of the types; true and false are no numbers."""
    return lambda value: isinstance(value, types) and (bool in types or not isinstance(value, bool))


is_text, is_whole, is_number = of_type(str), of_type(int), of_type(int, float)
is_object, is_list = of_type(dict), of_type(list)


def is_filled(value: Any) -> bool:
    """Whether it is a string or a list with something in it."""
    return isinstance(value, (str, list)) and bool(value)


def is_texts(value: Any) -> bool:
    """Whether it is a list of strings."""
    return isinstance(value, list) and all(map(is_text, value))


def require(section: JsonDict, name: str, holds: Callable[[Any], bool], otherwise: str, place: str = "") -> None:
    """Raises the API's error unless the section has the field and the condition holds for it."""
    if name not in section:
        raise EchoFault(400, f"{place}{name}: Field required")
    if not holds(section[name]):
        raise EchoFault(400, f"{place}{name}: {otherwise}")


def object_entries(values: Iterable[Any], place: str) -> Iterator[tuple[str, JsonDict]]:
    """The objects of a list, each behind its place for require(). Raises the API's error for what is none."""
    for index, value in enumerate(values):
        if not isinstance(value, dict):
            raise EchoFault(400, f"{place}.{index}: Input should be an object")
        yield f"{place}.{index}.", value


def split_words(text: str) -> Iterator[str]:
    """The words of a text, each with the white space before it, the last with that behind it, too: joined, the text. It
    may take long until all are sent: the text is held in UTF-8, since in a string with an emoji each character takes
    four bytes."""
    return words_in(text.encode("utf-8", "surrogatepass"))


def words_in(data: bytes) -> Iterator[str]:
    """The same of a text in UTF-8."""
    # Without rstrip() the expression would try in vain from every blank behind the last word.
    end = len(data.rstrip(BLANK_CHARACTERS.encode("ascii")))
    for match in WORD_IN_UTF_8.finditer(data, 0, end):
        yield (data[match.start() :] if match.end() == end else match[0]).decode("utf-8", "surrogatepass")
    if data and not end:
        yield data.decode("ascii")


def count_words(value: Any) -> int:
    """How many words all strings in a JSON value have: echo's idea of a token."""
    if isinstance(value, str):
        marks = value.encode("utf-8", "surrogatepass").translate(WORD_MARKS)
        return marks.count(b" w") + marks.startswith(b"w")
    if isinstance(value, dict):
        return sum(map(count_words, value.values()))
    return sum(map(count_words, value)) if isinstance(value, list) else 0


def content_text(content: Any) -> str:
    """The text of a message's content; where it has none, the types of its blocks, each in brackets."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else ""
    blocks = [block for block in content if isinstance(block, dict)]
    texts = [str(block["text"]) for block in blocks if "text" in block]
    texts += [content_text(block.get("content")) for block in blocks if block.get("type") == "tool_result"]
    return "\n".join(texts) if texts else " ".join(f"[{block.get('type')}]" for block in blocks)


def shorten(text: str, max_tokens: Optional[int], stops: Sequence[str]) -> tuple[str, str, Optional[str]]:
    """The text up to the first stop sequence or the limit, why it ends, and at which sequence."""
    if len(stops) > ECHO_STOPS or any(len(stop) > ECHO_STOP_CHARACTERS for stop in stops):
        limits = f"at most {ECHO_STOPS}, of at most {ECHO_STOP_CHARACTERS} characters"
        raise EchoFault(400, f"stop_sequences: echo takes {limits}")
    reason, sequence = "end_turn", None
    found = first_stop(text, [stop for stop in stops if stop])
    if found:
        end, sequence = found
        text, reason = text[:end], "stop_sequence"
    if max_tokens is not None and count_words(text) > max_tokens:
        text, reason, sequence = text[: end_of_word(text, max_tokens)], "max_tokens", None
    return narrow_enough(text), reason, sequence


def narrow_enough(text: str) -> str:
    """The text, which is held until it is sent. Raises EchoFault for a long one that has four bytes for each of its
    characters, as with an emoji among them, or many halves of surrogate pairs."""
    if sys.getsizeof(text) > 2 * ECHO_BODY_BYTES or halves_in(text) > ECHO_HALVES:
        raise EchoFault(413, "echo repeats no text of this length with such characters in it")
    return text


def halves_in(text: str) -> int:
    """How many lone halves of surrogate pairs a text has."""
    if text.isascii():
        return 0
    return (len(text.encode("utf-8", "surrogatepass")) - len(text.encode("utf-8", "ignore"))) // len(b"\xed\xa0\x80")


def end_of_word(text: str, number: int) -> int:
    """The index at which the word of this number, from 1, ends; the text has more of them."""
    # In pieces: in one call, `re` would hold up all threads until it has counted half a million.
    start = 0
    while True:
        blank = BLANK.search(text, start + ECHO_COUNTED_CHARACTERS)
        end = blank.start() if blank else len(text)
        words = count_words(text[start:end])
        if words >= number:
            return next(itertools.islice(WORD.finditer(text, start, end), number - 1, None)).end()
        number, start = number - words, end


def first_stop(text: str, stops: Sequence[str]) -> Optional[tuple[int, str]]:
    """The index of the first stop sequence in the text, and which it is; None if there is none."""
    # In pieces, since Python before 3.10 may take time in proportion to the product of both lengths.
    for start in range(0, len(text) if stops else 0, ECHO_AT_ONCE_BYTES):
        end = start + ECHO_AT_ONCE_BYTES
        found = [(text.find(stop, start, end + len(stop) - 1), stop) for stop in stops]
        begun = [(position, stop) for position, stop in found if position >= 0]
        if begun:
            return min(begun)
    return None


def sample(schema: Any) -> Any:
    """A small value that fits a JSON schema."""
    if not isinstance(schema, dict):
        return "echo"
    for name in ("const", "default"):
        if name in schema:
            return schema[name]
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        return schema["enum"][0]
    if schema.get("type") == "object" or "properties" in schema:
        properties = schema.get("properties") or {}
        # Each name once, however often it is required, so that each part of the schema is visited once.
        names = dict.fromkeys(name for name in schema.get("required") or [] if isinstance(name, str))
        return {name: sample(properties.get(name)) for name in names}
    values = {"integer": 1, "number": 1.0, "boolean": True, "array": [], "null": None}
    return values.get(str(schema.get("type")), "echo")


def reply_to(request: JsonDict, identity: str, text: str, tool: JsonDict, input_tokens: int) -> Reply:
    """What echo says to a request that was checked: the text, or a call of the tool if there is one."""
    stops = request.get("stop_sequences") or ()
    text, reason, sequence = shorten("" if tool else text, request.get("max_tokens"), stops)
    thinks = (request.get("thinking") or {}).get("type") in ("enabled", "adaptive")
    tool_input = sample(tool["input_schema"]) if "input_schema" in tool else {}
    narrow_enough(plain_json(tool_input))
    return Reply(
        id=identity,
        model=request["model"],
        thinking="The user's last text is to be repeated." if thinks else "",
        text=text,
        tool=tool.get("name", ""),
        tool_input=tool_input,
        stop_reason="tool_use" if tool else reason,
        stop_sequence=sequence,
        input_tokens=input_tokens,
    )


def plain_json(value: Any) -> str:
    """The value as JSON text; as escapes, what isn't ASCII would be three times as long."""
    return json.dumps(value, ensure_ascii=False)


def reply_response(request: JsonDict, reply: Reply, whole: JsonDict, events: Iterator[bytes]) -> EchoResponse:
    """A reply as a whole or in events, as was asked, at the pace and up to the end that the model's name asks for."""
    cut = request["model"].startswith("echo-cut")
    if not request.get("stream"):
        return echo_json(whole, cut)
    pause = ECHO_WORD_SECONDS if request["model"].startswith("echo-slow") else 0.0
    if cut:
        events = itertools.islice(events, 2 + reply.output_tokens // 2)
    return EchoResponse(200, "text/event-stream; charset=utf-8", events, cut=cut, pause=pause)


# -- the Anthropic format: https://docs.anthropic.com/en/api/messages and …/messages-streaming


def echo_messages(request: JsonDict, identity: str, now: int) -> EchoResponse:
    """POST /v1/messages."""
    require(request, "max_tokens", is_whole, "Input should be a valid integer")
    check_messages(request)
    check_sampling(request)
    check_tools(request)
    users = [message for message in request["messages"] if message["role"] == "user"]
    content = users[-1]["content"]
    results = isinstance(content, list) and any(block["type"] == "tool_result" for block in content)
    tool = {} if results else called_tool(request)
    text = "" if tool else content_text(content)
    reply = reply_to(request, f"msg_{identity}", text, tool, anthropic_input_tokens(request))
    message = anthropic_message(reply)
    return reply_response(request, reply, message, anthropic_events(message))


def echo_count_tokens(request: JsonDict, identity: str, now: int) -> EchoResponse:
    """POST /v1/messages/count_tokens."""
    check_messages(request)
    return echo_json({"input_tokens": anthropic_input_tokens(request)})


def check_messages(request: JsonDict) -> None:
    """Raises EchoFault unless there are turns that alternate, the first the user's, each with content."""
    require(request, "messages", is_list, "Input should be a valid list")
    if not request["messages"]:
        raise EchoFault(400, "messages: at least one message is required")
    before = "assistant"
    for place, message in object_entries(request["messages"], "messages"):
        require(message, "role", ("user", "assistant").__contains__, "Input should be 'user' or 'assistant'", place)
        require(message, "content", of_type(str, list), "Input should be a valid string or list", place)
        check_blocks(message["content"], place)
        if message["role"] == before:
            alternation = f'roles must alternate between "user" and "assistant", found "{before}" twice'
            broken = 'first message must use the "user" role' if message is request["messages"][0] else alternation
            raise EchoFault(400, f"messages: {broken}")
        before = message["role"]
    if "system" in request and not isinstance(request["system"], (str, list)):
        raise EchoFault(400, "system: Input should be a valid string or list")


def check_blocks(content: Any, place: str) -> None:
    """Raises EchoFault unless the content is a text or blocks with a type, and none of its texts is empty."""
    if not content:
        raise EchoFault(400, f"{place}content: must not be empty")
    for at, block in object_entries(content if isinstance(content, list) else (), f"{place}content"):
        require(block, "type", is_text, "Input should be a valid string", at)
        if block["type"] == "text":
            require(block, "text", lambda value: value and is_text(value), "text content blocks must be non-empty", at)


def check_sampling(request: JsonDict) -> None:
    """Raises EchoFault for a max_tokens or an optional field, where given, of a wrong type or out of range."""
    checks: Sequence[tuple[str, Callable[[Any], bool], str]] = (
        ("max_tokens", lambda value: value >= 1, "Input should be greater than or equal to 1"),
        ("temperature", lambda value: is_number(value) and 0 <= value <= 1, "range: 0..1"),
        ("top_p", lambda value: is_number(value) and 0 <= value <= 1, "range: 0..1"),
        ("top_k", lambda value: is_whole(value) and value >= 0, "Input should be greater than or equal to 0"),
        ("stop_sequences", is_texts, "Input should be a valid list of strings"),
        ("stop_sequences", lambda value: all(map(str.strip, value)), "each must contain non-whitespace"),
        ("stream", of_type(bool), "Input should be a valid boolean"),
        ("thinking", is_object, "Input should be an object"),
    )
    for name, holds, otherwise in checks:
        if request.get(name) is not None:
            require(request, name, holds, otherwise)
    thinking = request.get("thinking") or {}
    if thinking.get("type") == "enabled":
        require(thinking, "budget_tokens", is_whole, "Input should be a valid integer", "thinking.enabled.")
        if thinking["budget_tokens"] < 1024:
            raise EchoFault(400, "thinking.enabled.budget_tokens: Input should be greater than or equal to 1024")
        # Interleaved, the budget is that of all turns together.
        if thinking["budget_tokens"] >= request["max_tokens"] and not has_beta(request, "interleaved-thinking-"):
            raise EchoFault(400, "`max_tokens` must be greater than `thinking.budget_tokens`")


def check_tools(request: JsonDict) -> None:
    """Raises EchoFault unless each tool has a name, and a schema if the client runs it, and the choice is one."""
    tools = [] if request.get("tools") is None else request["tools"]
    choice = request.get("tool_choice") or {}
    if not isinstance(tools, list) or not isinstance(choice, dict):
        raise EchoFault(400, "tools: Input should be a valid list, and tool_choice an object")
    for place, tool in object_entries(tools, "tools"):
        require(tool, "name", is_text, "Input should be a valid string", place)
        if tool.get("type", "custom") == "custom":
            require(tool, "input_schema", is_object, "Input should be an object", place)
    if choice and choice.get("type") not in ("auto", "any", "tool", "none"):
        raise EchoFault(400, "tool_choice.type: Input should be 'auto', 'any', 'tool' or 'none'")
    if choice.get("type") in ("any", "tool") and not tools:
        raise EchoFault(400, "tool_choice: may only be specified while providing tools")
    if choice.get("type") == "tool" and choice.get("name") not in [tool["name"] for tool in tools]:
        raise EchoFault(400, f"tool_choice.name: Tool '{choice.get('name')}' not found in provided tools")


def called_tool(request: JsonDict) -> JsonDict:
    """The tool to call: the one that is forced, the first for echo-tool or where any must be, or none."""
    tools, choice = request.get("tools") or [], request.get("tool_choice") or {}
    kind = choice.get("type", "auto")
    if kind == "tool":
        return next(dict(tool) for tool in tools if tool["name"] == choice["name"])
    wanted = kind == "any" or (kind == "auto" and request["model"].startswith("echo-tool"))
    return dict(tools[0]) if tools and wanted else {}


def anthropic_input_tokens(request: JsonDict) -> int:
    """The words of system prompt, messages and tools; at least one, as the API counts."""
    texts = [content_text(message["content"]) for message in request["messages"]]
    return max(1, count_words([content_text(request.get("system")), *texts, request.get("tools")]))


def anthropic_message(reply: Reply) -> JsonDict:
    """A reply as a whole message."""
    thinking = {"type": "thinking", "thinking": reply.thinking, "signature": base64url(reply.id.encode())}
    call = {"type": "tool_use", "id": f"toolu_{reply.id[4:]}", "name": reply.tool, "input": reply.tool_input}
    content = [*([thinking] if reply.thinking else []), call if reply.tool else text_part(reply.text)]
    message = empty_message(reply.id, reply.model, message_usage(reply.input_tokens, 0, 0, reply.output_tokens))
    return {**message, "content": content, "stop_reason": reply.stop_reason, "stop_sequence": reply.stop_sequence}


def anthropic_events(message: JsonDict) -> Iterator[bytes]:
    """A whole message as the documented sequence of events."""
    opened = empty_message(message["id"], message["model"], {**message["usage"], "output_tokens": 1})
    yield named_event("message_start", message=opened)
    for index, block in enumerate(message["content"]):
        empty: JsonDict = {"text": "", "thinking": "", "signature": "", "input": {}}
        opening = {name: empty.get(name, value) for name, value in block.items()}
        yield named_event("content_block_start", index=index, content_block=opening)
        for delta in anthropic_deltas(block):
            yield named_event("content_block_delta", index=index, delta=delta)
        yield named_event("content_block_stop", index=index)
    stop = {name: message[name] for name in ("stop_reason", "stop_sequence")}
    yield named_event("message_delta", delta=stop, usage=message["usage"])
    yield named_event("message_stop")


def anthropic_deltas(block: JsonDict) -> Iterator[JsonDict]:
    """A content block piece by piece."""
    kind = block["type"]
    if kind == "tool_use":
        yield {"type": "input_json_delta", "partial_json": plain_json(block.pop("input"))}
        return
    for word in split_words(block.pop(kind)):
        yield {"type": f"{kind}_delta", kind: word}
    if kind == "thinking":
        yield {"type": "signature_delta", "signature": block["signature"]}


def named_event(event: str, **fields: Any) -> bytes:
    """One event of a stream, whose name is also the type in its data."""
    return b"event: %b\ndata: %b\n\n" % (event.encode("ascii"), echo_text({"type": event, **fields}))


# -- the OpenAI format: https://platform.openai.com/docs/api-reference


def echo_completion(request: JsonDict, identity: str, now: int) -> EchoResponse:
    """POST /v1/completions."""
    require(request, "prompt", is_filled, "Input should be a string or list")
    prompt = request["prompt"]
    reply = openai_reply(request, f"cmpl-{identity}", prompt if isinstance(prompt, str) else str(prompt[0]), {})
    finish = "length" if reply.stop_reason == "max_tokens" else "stop"
    total = reply.input_tokens + reply.output_tokens
    usage = {"prompt_tokens": reply.input_tokens, "completion_tokens": reply.output_tokens, "total_tokens": total}

    def completion(*choices: tuple[str, Optional[str]], usage: Optional[JsonDict] = None) -> JsonDict:
        told = [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason} for text, reason in choices]
        whole = {"id": reply.id, "object": "text_completion", "created": now, "model": reply.model, "choices": told}
        return {**whole, "usage": usage}

    asks_usage = request.get("stream") and (request.get("stream_options") or {}).get("include_usage")

    def events(words: Iterator[str]) -> Iterator[bytes]:
        last = [completion(("", finish)), *([completion(usage=usage)] if asks_usage else [])]
        for document in itertools.chain((completion((word, None)) for word in words), last):
            yield b"data: %b\n\n" % echo_text(document)
        yield b"data: [DONE]\n\n"

    whole = completion((reply.text, finish), usage=usage)
    response = reply_response(request, reply, whole, events(split_words(reply.text)))
    reply = reply._replace(text="")  # the events hold it, too
    return response


def echo_embeddings(request: JsonDict, identity: str, now: int) -> EchoResponse:
    """POST /v1/embeddings: vectors of length one that depend on the input alone."""
    require(request, "input", is_filled, "Input should be a string or list")
    given = request["input"]
    inputs = given if isinstance(given, list) and not is_whole(given[0]) else [given]
    wanted = request.get("dimensions")
    size = wanted if isinstance(wanted, int) and 1 <= wanted <= 4096 else 64
    if len(inputs) > ECHO_INPUTS or len(inputs) * size > ECHO_NUMBERS:
        raise EchoFault(400, f"input: echo takes at most {ECHO_INPUTS}, and makes {ECHO_NUMBERS} numbers of them")
    tokens = max(1, count_words(inputs))
    rest = {"model": request["model"], "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
    in_base64 = request.get("encoding_format") == "base64"
    seeds = [plain_json(item).encode("utf-8", "surrogatepass") for item in inputs]  # held until the last part is sent

    def parts() -> Iterator[bytes]:
        opening = '{"object": "list", "data": ['
        for index, seed in enumerate(seeds):
            document = {"object": "embedding", "index": index, "embedding": embedding(seed, size, in_base64)}
            part = f"{opening}{json.dumps(document)}".encode("ascii")
            del document  # thousands of numbers, while the part waits to be sent
            yield part
            opening = ", "
        yield f"], {json.dumps(rest)[1:]}".encode("ascii")

    return EchoResponse(200, "application/json", parts())


def embedding(seed: bytes, size: int, in_base64: bool) -> Union[str, list[float]]:
    """A vector of length one, the same for the same input on every machine; as base64 of floats, or as numbers."""
    numbers = random.Random(seed)
    vector = [numbers.uniform(-1, 1) for _ in range(size)]
    length = math.sqrt(sum(number * number for number in vector))
    vector = [number / length for number in vector]
    return base64.b64encode(struct.pack(f"<{size}f", *vector)).decode("ascii") if in_base64 else vector


def echo_responses(request: JsonDict, identity: str, now: int) -> EchoResponse:
    """POST /v1/responses: https://platform.openai.com/docs/api-reference/responses"""
    require(request, "input", is_filled, "Input should be a string or list")
    given = request["input"]
    items = given if isinstance(given, list) else [{"role": "user", "content": given}]
    results = items[-1].get("type") == "function_call_output"
    asked = [item for item in items if item.get("role") == "user"] or items
    text = str(items[-1].get("output")) if results else content_text(asked[-1].get("content"))
    functions = [tool for tool in request.get("tools") or [] if tool.get("type", "function") == "function"]
    plain = {"type": "object"}
    tools = [{"name": tool["name"], "input_schema": tool.get("parameters") or plain} for tool in functions]
    tool = {} if results else called_tool({"model": request["model"], "tools": tools})
    limited = {**request, "max_tokens": request.get("max_output_tokens"), "messages": items}
    reply = openai_reply(limited, f"resp_{identity}", text, tool)
    cut_short = reply.stop_reason == "max_tokens"
    part = {"type": "output_text", "text": reply.text, "annotations": []}
    item: JsonDict = {"id": f"msg_{identity}", "type": "message", "role": "assistant", "content": [part]}
    if reply.tool:
        item = {"id": f"fc_{identity}", "type": "function_call", "call_id": f"call_{identity}", "name": reply.tool}
        item["arguments"] = plain_json(reply.tool_input)
    item["status"] = "completed"
    details = {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
    usage = {"input_tokens": reply.input_tokens, "output_tokens": reply.output_tokens, **details}
    usage["total_tokens"] = reply.input_tokens + reply.output_tokens
    given = request.get("instructions")
    instructions = narrow_enough(given) if isinstance(given, str) else None
    whole = {
        "id": reply.id, "object": "response", "created_at": now, "status": "incomplete" if cut_short else "completed",
        "error": None, "incomplete_details": {"reason": "max_output_tokens"} if cut_short else None,
        "instructions": instructions, "metadata": {}, "model": reply.model, "output": [item],
        "parallel_tool_calls": True, "temperature": 1.0, "tool_choice": "auto", "tools": [], "top_p": 1.0,
        "usage": usage,
    }  # fmt: skip
    events = enumerate(response_events(reply._replace(tool_input={}), whole))
    named = (named_event(f"response.{name}", sequence_number=number, **fields) for number, (name, fields) in events)
    return reply_response(request, reply, whole, named)


def response_events(reply: Reply, whole: JsonDict) -> Iterator[tuple[str, JsonDict]]:
    """A response as its sequence of events, each by its name behind `response.` and its fields."""
    item, opened = whole["output"][0], {**whole, "status": "in_progress", "output": [], "usage": None}
    place = {"item_id": item["id"], "output_index": 0}
    yield "created", {"response": opened}
    yield "in_progress", {"response": opened}
    empty: JsonDict = {"arguments": ""} if reply.tool else {"content": []}
    yield "output_item.added", {"output_index": 0, "item": {**item, **empty, "status": "in_progress"}}
    if reply.tool:
        yield "function_call_arguments.delta", {**place, "delta": item["arguments"]}
        yield "function_call_arguments.done", {**place, "name": reply.tool, "arguments": item["arguments"]}
    else:
        part, place = item["content"][0], {**place, "content_index": 0}
        yield "content_part.added", {**place, "part": {**part, "text": ""}}
        # Until all words are sent, the text is held in UTF-8 alone.
        said, part["text"], reply = reply.text.encode("utf-8", "surrogatepass"), "", reply._replace(text="")
        # No name stands for the word that is being sent, which may be all of the text.
        yield from map(lambda word: ("output_text.delta", {**place, "delta": word, "logprobs": []}), words_in(said))
        part["text"] = said.decode("utf-8", "surrogatepass")
        del said
        yield "output_text.done", {**place, "text": part["text"], "logprobs": []}
        yield "content_part.done", {**place, "part": part}
    yield "output_item.done", {"output_index": 0, "item": item}
    yield whole["status"], {"response": whole}


def openai_reply(request: JsonDict, identity: str, text: str, tool: JsonDict) -> Reply:
    """What echo says to a request in OpenAI's format."""
    limit, stop = request.get("max_tokens"), request.get("stop") or []
    if limit is not None and not (is_whole(limit) and limit >= 1):
        raise EchoFault(400, "max_tokens: Input should be greater than or equal to 1")
    stops = [stop] if isinstance(stop, str) else stop
    if not is_texts(stops):
        raise EchoFault(400, "stop: Input should be a string or a list of strings")
    texts = [content_text(message.get("content")) for message in request.get("messages") or ()]
    input_tokens = max(1, count_words([*texts, request.get("prompt"), request.get("tools")]))
    checked = {"model": request["model"], "max_tokens": limit, "stop_sequences": stops}
    return reply_to(checked, identity, text, tool, input_tokens)


ECHO_ENDPOINTS: Mapping[str, Callable[[JsonDict, str, int], EchoResponse]] = {
    "/v1/messages": echo_messages,
    "/v1/messages/count_tokens": echo_count_tokens,
    "/v1/completions": echo_completion,
    "/v1/responses": echo_responses,
    "/v1/embeddings": echo_embeddings,
}


# ==== Event loop =================================================================================
#
# One thread serves everybody. It runs tasks: a task is a coroutine, and where it would have to wait, it awaits
# until(), with a deadline on the loop's clock. It is resumed when something may have happened: on one of its
# channels, or to what it has started. So it checks again what it waits for, and waits again if need be. At its
# deadline Overdue is raised in it, and ClientGone as soon as its client has left. Between two waits no other task
# runs, so what tasks share needs no lock. What would block in the system (looking up a name), or takes long in one
# piece (hashing a password, a long translation), is done by another thread, see in_thread().
#
# The loop runs in turns: it waits for sockets, receives on their channels, resumes their tasks, and in the end sends
# what was put off in that turn. Work that would take long is done in steps of a few milliseconds, after each of
# which its task gives way: all tasks that do so share PATIENT_SECONDS of a turn, with those that go on with the result
# of a thread or of another task. Beyond LATE_SECONDS, the sockets that are left wait for the next one, and those that
# come meanwhile queue behind them. What waits so stands in queues that are served one by one in turns: a client that
# asks for little waits for one of those that are dear to serve, however many there are. In each queue, the callers and
# addresses have turns, too: nobody waits for thousands of requests of another. A deadline that passes while an event of
# the task, or a result for it, waits there is told behind that: it was the loop that was late.
#
# Why the loop is this file's own, and not asyncio's: a stream costs no transport, protocol, future and callback for
# each event; a client's departure is seen while nothing is read from it; and a deadline is a number, not a timer.

Result = TypeVar("Result")
Item = TypeVar("Item")

READABLE, WRITABLE = selectors.EVENT_READ, selectors.EVENT_WRITE
NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)  # is left for this process, or in the whole system
NO_MEMORY = (MemoryError, SystemError)  # the latter where CPython has none for the former
CONNECTING = (0, errno.EINPROGRESS, errno.EWOULDBLOCK, getattr(errno, "WSAEWOULDBLOCK", 0))
# When the first probe of a silent connection is sent, and the next; macOS calls the first TCP_KEEPALIVE.
PROBES = [
    (getattr(socket, name), seconds)
    for name, seconds in (("TCP_KEEPIDLE", 60), ("TCP_KEEPALIVE", 60), ("TCP_KEEPINTVL", 30))
    if hasattr(socket, name)
]
# What Linux tells of a connection first is its state (tcp(7), and include/net/tcp_states.h).
TCP_INFO = getattr(socket, "TCP_INFO", 0)
TCP_CLOSE, TCP_CLOSE_WAIT = 7, 8


def lacks_descriptor(error: Exception) -> bool:
    """Whether something failed since no file descriptor is left."""
    return isinstance(error, OSError) and error.errno in NO_DESCRIPTOR


def tune(sock: socket.socket) -> None:
    """Sets a TCP connection to send at once (no Nagle), and to probe whether its peer is there (keep-alive): NATs
    forget what is silent for some minutes."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in PROBES:
        sock.setsockopt(socket.IPPROTO_TCP, option, seconds)


def tcp_info(sock: socket.socket, size: int) -> bytes:
    """The first bytes of what Linux tells of a TCP connection; zeros where it, or another system, doesn't."""
    try:
        told = sock.getsockopt(socket.IPPROTO_TCP, TCP_INFO, size) if TCP_INFO else b""
    except OSError:
        told = b""
    return told.ljust(size, b"\0")


class TlsSocket:
    """TLS on a connected socket that doesn't block. It gives OpenSSL one piece of what has arrived at a time: an
    OpenSSL that reads the socket itself doesn't return while records without content come, maybe without end."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, host: str) -> None:
        self._sock = sock
        self._arrived, self._made = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._arrived, self._made, server_hostname=host)
        self._unsent = b""
        self._accepted = 0  # bytes whose records are among the unsent ones
        self._has_failed = False  # whether an error stands behind what was received last
        self._has_ended = False  # whether a close_notify does

    async def do_handshake(self, run: Callable[[Callable[[], None]], Coroutine[float, None, None]]) -> None:
        """Goes on with the handshake, and has `run` do what touches no socket: how long that takes (for ffdhe8192 0.2
        s) the provider chooses. Raises SSLWantReadError when more has to arrive, SSLWantWriteError when there is no
        room to send, OSError, and what `run` raises."""
        with contextlib.suppress(BlockingIOError):  # the first step is ours
            self._take()
        try:
            await run(self._tls.do_handshake)
        except OSError:
            self._flush()  # what the step has made, such as the alert that says why it failed
            raise
        if not self._flush():
            raise ssl.SSLWantWriteError

    def recv(self, size: int) -> bytes:
        """What has arrived; more than `size` if so much came at once. Raises BlockingIOError and OSError."""
        if self._has_ended:  # what comes behind a close_notify, such as a reset, says nothing of what came before
            return b""
        self._take()
        pieces = []
        try:
            while True:
                piece = self._tls.read(size)
                if not piece:
                    self._has_ended = True
                    break
                pieces.append(piece)
        except ssl.SSLWantReadError:
            # One that takes nothing any more may have responded before, as to a request that is too long for it.
            with contextlib.suppress(OSError):
                self._flush()
            if len(self._unsent) > 2 * RECEIVE_BYTES:  # of which no more than half is a part of a request
                raise ConnectionAbortedError("it wants answers and doesn't take them") from None
            if not pieces:
                raise BlockingIOError from None
            return b"".join(pieces)
        except OSError:
            if not pieces:
                raise
            self._has_failed = True
        # Behind these bytes comes the end or an error: shut down, the socket is reported by the selector again.
        if pieces:
            with contextlib.suppress(OSError):  # it is closed already
                self._sock.shutdown(socket.SHUT_RD)
        return b"".join(pieces)

    def send(self, data: Union[bytes, memoryview]) -> int:
        """Sends what there is room for; how many of the bytes that was. Raises OSError, and BlockingIOError when it has
        to be called again with the same bytes."""
        if not self._accepted:
            if not self._flush():
                raise BlockingIOError
            part, count = memoryview(data)[:RECEIVE_BYTES], 0  # no more: see recv()
            while count < len(part):
                count += self._tls.write(part[count:])
            self._accepted = count
        if not self._flush():
            raise BlockingIOError
        count, self._accepted = self._accepted, 0
        return count

    def _take(self) -> None:
        """Gives OpenSSL the next piece of what has arrived. Raises BlockingIOError and OSError."""
        if self._has_failed:  # OpenSSL may tell of a fatal alert once only, and then as if it were a close_notify
            raise ConnectionAbortedError("TLS has failed")
        data = self._sock.recv(TLS_RECEIVE_BYTES)
        if data:
            self._arrived.write(data)
        else:
            self._arrived.write_eof()

    def _flush(self) -> bool:
        """Sends the records that were made; whether all of them were sent. Raises OSError."""
        if self._made.pending:
            self._unsent += self._made.read()
        if self._unsent:
            try:
                self._unsent = self._unsent[self._sock.send(self._unsent) :]
            except BlockingIOError:
                pass
        return not self._unsent


class Channel:
    """One connection, to a client or to a provider, and what has arrived on it and not been used yet.

    It stays with the loop's selector for as long as it is open. What arrives is received at once, up to a
    limit, and the task that owns it is resumed; one without a task waits in a pool, and is closed as soon as the
    other side closes it or sends something."""

    __slots__ = (
        "_blocked", "_loop", "_outgoing", "_queued", "_slow", "_watched", "_window", "_wire", "answered", "broken",
        "closed", "ended", "extra_fields", "idle_since", "kept_at", "kept_in_turn", "opened_at", "opening",
        "received", "send_failed", "sock", "target_prefix", "task",
    )  # fmt: skip

    def __init__(self, sock: socket.socket, loop: "EventLoop", window: int = HELD_BYTES) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._wire: Union[socket.socket, TlsSocket] = sock  # what its bytes go through
        self.task = loop.running
        self.received = b""
        self.answered = False  # whether anything has come since the last request was begun
        self.send_failed = False  # whether what was put off could not be sent
        self.ended = False  # whether the other side has closed, or the connection is broken
        self.broken = False  # whether it ended otherwise than by a FIN, over TLS by a close_notify
        self.closed = False  # whether this side has
        self.opening = False  # whether the connection, or its TLS handshake, is still being made
        self.opened_at = loop.now
        self.idle_since = 0.0
        self.kept_at = 0.0  # the same in seconds since 1970
        self.kept_in_turn = 0  # in which turn of the loop it came into a pool; 0 once it is used again
        self.target_prefix = ""  # what an HTTP proxy wants before the path
        self.extra_fields: Pairs = []  # and the credential it wants
        self._outgoing = b""  # put off until the end of a turn of the loop, or until there is room
        self._blocked = False  # whether it took less than was to be sent
        self._slow = False  # whether the last event took long
        self._queued = False  # whether the next one waits for its turn
        self._loop = loop
        self._window = window
        self._watched = READABLE
        loop.selector.register(sock, READABLE, self._ready)

    @property
    def is_full(self) -> bool:
        """Whether the receive buffer was full, and there isn't room for more again: reading rests until then."""
        return not (self.ended or self._watched & READABLE)

    @property
    def is_sending(self) -> bool:
        """Whether something that was put off is still to be sent."""
        return bool(self._outgoing) and not self.closed

    def set_window(self, window: int) -> None:
        """Sets how many received bytes may wait to be used, and reads on if there is room for more."""
        if window != self._window:
            self._window = window
            self._watch()

    def take_all(self) -> bytes:
        """Takes all that has arrived."""
        data = self.received
        self.keep(b"")
        return data

    def take(self, count: int) -> bytes:
        """Takes the first bytes of what has arrived."""
        data = self.received
        self.keep(data[count:])
        return data[:count]

    def keep(self, rest: bytes) -> None:
        """Keeps only this of what has arrived, and reads on if there is room; in a small window only when half of it is
        free: one that is full would else be read into once for each request in it."""
        self.received = rest
        if not self._watched & READABLE:
            low_water = self._window if self._window >= HELD_BYTES else self._window // 2
            if len(rest) < low_water:
                self._watch()

    def send_now(self, data: Union[bytes, memoryview]) -> int:
        """Sends what there is room for; how many of the bytes that was. The task is resumed when there is room for
        more. Raises OSError."""
        if self._outgoing and not self.flush():
            return 0
        if self.kept_in_turn:
            self._look_before_use()
        try:
            sent = self._wire.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            # A break is told once: without TLS, which has an end of its own, what is received now ends as if by a FIN.
            # Behind a FIN, a send meets a broken pipe.
            self.broken |= not (self.ended or isinstance(error, BrokenPipeError)) and self._wire is self.sock
            raise
        if sent < len(data):
            self._await_room()
        return sent

    async def send(self, data: bytes, pause_seconds: float, has_responded: Optional[Callable[[], bool]] = None) -> None:
        """Sends all of the data. A short message may be queued until the end of a turn; if that fails, `send_failed`
        is set and the task is woken. Raises Overdue when nothing was taken for the pause, OSError, and EarlyResponse
        with the rest as soon as `has_responded` says that the provider speaks meanwhile."""
        if self._loop.crowded and len(data) < COPIED_BYTES and not self._outgoing:
            # Sent one right after the other, messages wake those who wait for them less often: a fifth of the CPU
            # time of a request at 32 clients.
            self._outgoing = data
            self._loop.outbox.append(self)
            return
        sent = self.send_now(data)
        rest = memoryview(data)[sent:] if sent < len(data) else b""
        while rest:
            patience, sent = Patience(self, self._loop.now, pause_seconds), 0
            while not sent:
                if has_responded and has_responded():
                    raise EarlyResponse(rest)
                await patience.wait()
                sent = self.send_now(rest)
            rest = rest[sent:]

    async def arrival(self, deadline: float) -> bool:
        """Waits until more has arrived, or the other side has closed; whether it has. Raises Overdue and ClientGone."""
        before = len(self.received)
        while len(self.received) == before and not self.ended:
            await until(deadline)
        return len(self.received) > before

    async def room(self, deadline: float) -> None:
        """Waits until there is room to send more. Raises Overdue and ClientGone."""
        self._await_room()
        while self._blocked:
            await until(deadline)

    async def send_rest(self) -> None:
        """Sends what was put off. Raises Overdue when nothing was taken for STALLED_CLIENT_SECONDS, and OSError."""
        patience = Patience(self, self._loop.now, STALLED_CLIENT_SECONDS)
        while not self.flush():
            await patience.wait()

    async def finish_sending(self) -> None:
        """Sends what was put off, and closes this side. Raises Overdue and OSError."""
        await self.send_rest()
        self.sock.shutdown(socket.SHUT_WR)

    def flush(self) -> bool:
        """Sends what was put off; whether all of it was sent. Raises OSError."""
        data, self._outgoing = self._outgoing, b""
        self._outgoing = data[self.send_now(data) :] if data else b""
        return not self._outgoing

    def end_turn(self) -> None:
        """Sends what was put off, and wakes the task when the connection turns out to be broken."""
        try:
            if not self.closed:
                self.flush()
        except OSError:
            self.send_failed = True
            if not self.ended:
                self.receive()  # the other side may have spoken before it broke off
            self._wake()

    async def connect(self, address: Any, deadline: float) -> None:
        """Connects its socket to an address. Raises Overdue, ClientGone and OSError."""
        self.opening = True
        error = self.sock.connect_ex(address)
        if error in CONNECTING:
            await self.room(deadline)
            error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
        self.opening = False

    async def secure(self, context: ssl.SSLContext, host: str, deadline: float) -> None:
        """Makes the connection one of TLS. Raises Overdue, ClientGone and OSError."""
        loop, tls, window = self._loop, TlsSocket(self.sock, context, host), self._window
        worker = loop.handshakes[host]
        self.opening = True
        while self.opening:
            self.set_window(0)  # else what arrives during a step would keep the loop busy
            try:
                await tls.do_handshake(lambda step: in_thread(loop, step, worker, deadline=deadline))
                self.opening = False
            except ssl.SSLWantReadError:
                self.set_window(window)
                await until(deadline)  # what arrives is for the handshake
            except ssl.SSLWantWriteError:
                await self.room(deadline)
        self._wire = tls
        self.set_window(window)

    def _look_before_use(self) -> None:
        """Makes sure, right before the next request is sent, that a kept connection is in order: what came unasked
        must not be taken for the response. Raises OSError."""
        self.kept_in_turn = 0
        try:
            if not (self.received or self.ended):
                self._wire.recv(1)
        except BlockingIOError:
            return
        except OSError:
            pass  # it is closed
        self.received, self._outgoing, self.answered, self.ended = b"", b"", False, True
        self._watch()
        raise ConnectionResetError(errno.ECONNRESET, "the kept connection was closed, or spoke unasked")

    def has_hung_up(self) -> bool:
        """Whether the peer has closed while its bytes still wait in the kernel. Where that isn't told, the next send
        fails."""
        return tcp_info(self.sock, 1)[0] in (TCP_CLOSE, TCP_CLOSE_WAIT)

    def is_lost(self) -> Optional[bool]:
        """Whether so much had to be sent again without an acknowledgement that the peer isn't there any more: its
        network, this one or a NAT between them has changed. None if nothing had to, or the system doesn't tell."""
        resent, probes = tcp_info(self.sock, 4)[2:]
        return resent + probes >= LOST_RESENDS if resent + probes else None

    def taken(self) -> int:
        """How many bytes the peer's system has taken so far; 0 where this one doesn't tell. It tells of room to send
        when a third of its buffer, of up to 4 MB, is free: minutes later for a peer that takes 10 kB/s."""
        return int.from_bytes(tcp_info(self.sock, 128)[120:], sys.byteorder)

    def abort_on_close(self, abort: bool) -> None:
        """Sets whether close() resets the connection: a reset can't be taken for the end of a response."""
        with contextlib.suppress(OSError):  # it is broken already
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", abort, 0))

    def close(self) -> None:
        """Closes the connection."""
        if not self.closed:
            self.closed = True
            if self._watched:
                self._loop.selector.unregister(self.sock)
            try:
                self.sock.close()
            except OSError:
                pass  # closed is closed

    def _ready(self, events: int) -> None:
        """Called by the loop: the socket is readable or writable. Where that took long the last time, or the turn is
        late, it is served later: what is cheap to serve must not wait for what isn't."""
        loop = self._loop
        if not self._slow and loop.moment <= loop.late_at:
            self._serve(events, is_far=loop.was_long)
        elif not self._queued:
            task = self.task
            sides = loop.slow if self._slow else loop.late
            queue = sides.clients if task and self is task.client else sides.providers
            queue.put(lambda: self._serve_late(events, task), task.origin if task else "")
            self._queued = True  # once it waits: there may be no memory for that
            if task:
                task.unseen += 1

    def _serve_late(self, events: int, task: Optional["Task"]) -> None:
        """Serves an event that has waited for its turn, and resumes the task if its time has come meanwhile."""
        self._queued = False
        if task:
            task.unseen -= 1
        self._serve(events, is_far=True)
        if task:
            self._loop.resume_if_overdue(task)

    def _serve(self, events: int, is_far: bool) -> None:
        """Sends and receives what the socket is ready for, and wakes the task. Where the next turn `is_far`, takes as
        much of what a client sends as may wait: a long body would come in hundreds of them. But not for long: CPython's
        lock may have to be waited for each time."""
        loop, takes_all = self._loop, is_far and self.task is not None and self is self.task.client
        begun = loop.moment
        latest = begun + SLOW_EVENT_SECONDS
        if self.closed:
            return  # by an event before this one
        if events & WRITABLE:
            self._blocked = False
            self._watch()
            self.end_turn()
        if events & self._watched & READABLE and not self.opening:
            if self.kept_in_turn and self.task:
                self._refuse_early_bytes()
            else:
                while self.receive() == RECEIVE_BYTES and takes_all and not self.is_full and loop.clock() <= latest:
                    pass
        self._wake()
        loop.moment = loop.clock()
        self._slow = loop.moment > latest

    def _refuse_early_bytes(self) -> None:
        """Receives on a kept connection whose next request is put off: what comes before it is no response to it."""
        try:
            self._look_before_use()
        except OSError:
            self.send_failed = True

    def _wake(self) -> None:
        """Wakes the task that owns this channel. An idle upstream connection has none: it is closed when it speaks."""
        task = self.task
        if task:
            task.resume(ClientGone() if self.ended and self is task.client else None)
        elif self.received or self.ended:
            self.close()

    def receive(self) -> int:
        """Takes what has arrived, or the end of it; how many bytes that were."""
        # A small window, a client's, is kept exactly.
        room = RECEIVE_BYTES if self._window >= HELD_BYTES else max(1, self._window - len(self.received))
        try:
            data = self._wire.recv(room)
            self.received = self.received + data if self.received else data
        except BlockingIOError:
            return 0
        except (OSError, MemoryError):  # what there is no memory for would be reported again and again
            data, self.broken = b"", True
        if data:
            self.answered = True
        else:
            self.ended = True
        if not data or len(self.received) >= self._window:
            self._watch()
            # While a client isn't received from, only the sweep sees that it leaves.
            self._loop.sweep_at = min(self._loop.sweep_at, self._loop.now + AHEAD_SECONDS)
        return len(data)

    def _await_room(self) -> None:
        """Asks for the task to be resumed when there is room to send more."""
        self._blocked = True
        self._watch()

    def _watch(self) -> None:
        """Tells the selector for which events to watch."""
        rests = self.ended or len(self.received) >= self._window
        wanted = (0 if rests else READABLE) | (WRITABLE if self._blocked else 0)
        selector = self._loop.selector
        if wanted == self._watched:
            return
        if not wanted:
            selector.unregister(self.sock)
        elif not self._watched:
            selector.register(self.sock, wanted, self._ready)
        else:
            selector.modify(self.sock, wanted, self._ready)
        self._watched = wanted


class Patience:
    """The time for which the peer of a channel may take nothing of what is to be sent."""

    def __init__(self, channel: Channel, begun: float, seconds: float) -> None:
        self._channel = channel
        self._seconds = seconds
        self._deadline = begun + seconds / 2  # by then, what was on its way has arrived
        self._taken = -1

    async def wait(self) -> None:
        """Waits until something may have happened. Raises Overdue when the peer has taken nothing for so long, and
        ClientGone."""
        while True:
            try:
                await until(self._deadline)
                return
            except Overdue:
                before, self._taken = self._taken, self._channel.taken()
                if before == self._taken:
                    raise
                self._deadline += self._seconds / 2 if before < 0 else self._seconds


class Task:
    """A coroutine that the loop runs; `client` is the channel of the client that it serves, and `origin` says whose it
    is, where it has to wait for its turn."""

    __slots__ = (
        "_coroutine", "_loop", "_name", "_result", "_waiting", "client", "deadline", "done", "origin", "unseen",
    )  # fmt: skip

    def __init__(self, coroutine: Coroutine[float, None, Any], loop: "EventLoop", origin: str, name: Any) -> None:
        self.client: Optional[Channel] = None
        self.origin = origin
        self._name = name  # by which others find it, see start_for_all()
        self.deadline = math.inf
        self.unseen = 0  # events on its channels, and results, that wait for their turn
        self.done = False
        self._loop = loop
        self._coroutine = coroutine
        self._result: Any = None
        self._waiting: dict[Task, None] = {}  # those to resume when this one is done

    def resume(self, error: Optional[Exception] = None) -> None:
        """Runs it until it waits again; an error is raised in it. A defect ends this task only."""
        if self.done:
            return
        loop = self._loop
        outer, loop.running = loop.running, self
        try:
            self.deadline = self._coroutine.throw(error) if error else self._coroutine.send(None)
        except StopIteration as end:
            self._result = end.value
            self._end()
        except Exception as fault:
            loop.warn(f"internal error: {describe(fault)}")
            self._end()
        finally:
            loop.running = outer
            del error  # else its traceback and this frame would keep each other, and a body that was being sent
        if self.deadline < loop.sweep_at:
            loop.sweep_at = self.deadline

    def cancel(self) -> None:
        """Stops it at the await where it is, running its `finally` blocks."""
        self._end()
        self._coroutine.close()

    async def finished(self, deadline: float = math.inf) -> Any:
        """What its coroutine returns, None after a defect; waits until it is done. Raises Overdue and ClientGone."""
        waiting = self._loop.current
        try:
            while not self.done:
                self._waiting[waiting] = None
                await until(deadline)
            return self._result
        finally:
            self._waiting.pop(waiting, None)  # a name may be looked up for long, while thousands ask for it and leave

    def _end(self) -> None:
        """Marks the task as done, and wakes the tasks that wait for it, in turns: there may be thousands."""
        self.done = True
        self.client = None
        self.deadline = math.inf
        self._loop.tasks.pop(self, None)
        self._loop.for_all.pop(self._name, None)
        while self._waiting:  # emptied, since a task that is done may be kept for long
            waiting = next(iter(self._waiting))
            self._loop.resume_in_turn(waiting)
            del self._waiting[waiting]


Action = Callable[[], object]
FOR_ALL = "all"  # the origin of a task that many may wait for: they don't wait behind all that the first of them wants


class FairQueue:
    """Actions that wait. Their origins have turns, so that nobody waits for many of another; those of one origin keep
    their order."""

    def __init__(self) -> None:
        self._waiting: collections.OrderedDict[str, collections.deque[Action]] = collections.OrderedDict()  # by origin
        self._count = 0

    def __len__(self) -> int:
        """How many wait."""
        return self._count

    def of(self, origin: str) -> int:
        """How many of an origin wait. Any thread may ask."""
        return len(self._waiting.get(origin, ()))

    def put(self, action: Action, origin: str = "") -> None:
        """Adds one behind the others of its origin."""
        count, actions = self._count + 1, self._waiting.get(origin)  # first what there may be no memory for
        if actions is None:
            self._waiting[origin] = collections.deque((action,))
        else:
            actions.append(action)
        self._count = count

    def take(self) -> Action:
        """Takes the next one; the others of its origin go behind those of everybody else."""
        count, origin = self._count - 1, next(iter(self._waiting))
        self._waiting.move_to_end(origin)  # before anything is taken: there may be no memory for that
        actions = self._waiting[origin]
        action = actions.popleft()
        if not actions:
            del self._waiting[origin]
        self._count = count
        return action


class Sides(NamedTuple):
    """What is called later for clients, and for providers: neither side waits for many of the other."""

    clients: FairQueue
    providers: FairQueue


class EventLoop:
    """The thread that serves all tasks. `clock` returns monotonic seconds."""

    def __init__(self, warn: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.warn = warn
        self.clock = clock
        self.selector = selectors.DefaultSelector()
        self.now = clock()  # when the turn began
        self.moment = self.now  # the same, or when one of its events was dealt with
        self.late_at = self.now  # from when on the turn is late
        self.was_long = False  # whether the last turn took more than SLOW_EVENT_SECONDS, as the next one may
        self.running: Optional[Task] = None
        # No set, which keeps what is added without memory for more room, though it says that it can't, and which hangs
        # when it is full of such.
        self.tasks: dict[Task, None] = {}
        self.for_all: dict[Any, Task] = {}  # those that any number may wait for
        self.sweep_at = 0.0
        self._look_at = 0.0  # when clients with full buffers are looked at again
        self._unlooked = 0  # how many origins wait for that
        self.turn = 1
        # What is called in a later turn: events of sockets that came late; tasks that gave way, or have a result that
        # they waited for; events that may take long; and tasks that have had their turn and want another one at once.
        self.late = Sides(FairQueue(), FairQueue())
        self.patient = FairQueue()
        self.slow = Sides(FairQueue(), FairQueue())
        self.greedy = FairQueue()
        self._unhurried = (self.patient, *self.slow, self.greedy)
        self.crowded = False  # whether there is more than one to serve in this turn
        self.outbox: collections.deque[Channel] = collections.deque()  # those with something to send at its end
        # Threads for calls that are too long for the loop, longer and longer ones: none waits for one of a longer kind.
        self.worker, self.long_worker, self.late_worker = Worker(), Worker(), Worker()
        # The same for the steps of TLS with providers, by host: they wait for others of the same provider only.
        self.handshakes: collections.defaultdict[str, Worker] = collections.defaultdict(Worker)
        self.make_room: Callable[[], object] = lambda: None  # called when memory is short, or descriptors are
        self.accept: Callable[[], object] = lambda: None  # called in turns that are late
        self._stopped = False
        self._posted: collections.deque[Action] = collections.deque()
        self.arrived = FairQueue()  # new connections, by the address that they come from
        self._wakeup_reader, self._wakeup_writer = socket.socketpair()
        self._wakeup_reader.setblocking(False)
        self._wakeup_writer.setblocking(False)
        self._wakeup_pending = False
        self.selector.register(self._wakeup_reader, READABLE, self._on_wakeup)

    @property
    def current(self) -> Task:
        """The task that is running."""
        assert self.running, "not called from a task"
        return self.running

    def post(self, action: Action) -> None:
        """Calls the action soon in the loop's thread. The only method that other threads may call."""
        self._posted.append(action)
        if not self._wakeup_pending:
            self._wakeup_pending = True
            try:
                self._wakeup_writer.send(b"\0")
            except OSError:
                self._wakeup_pending = False  # the loop has just ended, or the system has no memory for a moment

    def start(self, coroutine: Coroutine[float, None, Any], origin: str = "", name: Any = None) -> Task:
        """Begins a task, and runs it until it waits for the first time. It has the origin of the one that begins it
        unless another is given."""
        task = Task(coroutine, self, origin or (self.running.origin if self.running else ""), name)
        self.tasks[task] = None
        if name is not None:
            self.for_all[name] = task
        task.resume()
        return task

    def start_for_all(self, name: Any, work: Callable[[], Coroutine[float, None, Any]]) -> Task:
        """The task that does some work, once for all who ask for it by this name until it is done."""
        return self.for_all.get(name) or self.start(work(), FOR_ALL, name)

    def run(self) -> None:
        """Serves until it is stopped."""
        sys.setswitchinterval(SWITCH_SECONDS)
        while not self._stopped:
            try:
                self._turn()
            except Exception as fault:  # what was not reached comes again in the next turn
                if isinstance(fault, NO_MEMORY):
                    self.now = self.clock()
                    self.make_room()
                self.warn(f"internal error: {describe(fault)}")
                time.sleep(TICK_SECONDS)
        self._wakeup_pending = True  # so that post() sends no more
        for resource in (self.selector, self._wakeup_reader, self._wakeup_writer):
            resource.close()

    def _turn(self) -> None:
        """Waits until there is something to do, and does it."""
        is_behind = any(self.late)
        waiting = is_behind or self._posted or self.arrived or self.outbox or any(self._unhurried)
        moment = self.clock()
        self.was_long = moment > self.now + SLOW_EVENT_SECONDS
        ready = self.selector.select(0 if waiting else max(0.0, self.sweep_at - moment))
        if not ready and self.clock() > self.sweep_at:
            # The stop of a process (SIGSTOP) interrupts the wait, which then has found nothing of what came.
            ready = self.selector.select(0)
        self.now = self.moment = self.clock()
        # While some wait, those who come now queue behind them, for the one turn that all of them have.
        self.late_at = -math.inf if is_behind else self.now + LATE_SECONDS
        self.turn += 1
        self.crowded = len(ready) > 1
        for key, events in ready:
            key.data(events)
        if is_behind:
            self._serve(self.late, LATE_SECONDS)
            self.accept()
        if self._posted:
            self._serve_posted()
        if self.arrived:
            self._serve((self.arrived,), POSTED_SECONDS)
        if self.now >= self.sweep_at:
            self._sweep()
        if any(self._unhurried):
            self._serve(self._unhurried, PATIENT_SECONDS)
            # For the threads that accept and log: one that releases CPython's lock for a moment more often than every
            # 5 ms takes it again before any of them has woken up.
            time.sleep(OTHER_THREADS_SECONDS)
        self._end_turn()

    def _serve_posted(self) -> None:
        """Calls what was posted, for POSTED_SECONDS at most, however late the turn is."""
        deadline = self.clock() + POSTED_SECONDS
        for _ in range(len(self._posted)):
            self._posted.popleft()()
            if self.clock() > deadline:
                break

    def _serve(self, queues: Sequence[FairQueue], seconds: float) -> None:
        """Calls what waits, for so many seconds in all, and QUEUE_SECONDS of each queue: cheap calls don't wait for as
        many dear ones."""
        begun = self.moment = self.clock()
        while any(queues) and self.moment <= begun + seconds:
            for queue in queues:
                latest = self.moment + QUEUE_SECONDS
                for _ in range(len(queue)):
                    queue.take()()
                    self.moment = self.clock()
                    if self.moment > latest:
                        break

    def _end_turn(self) -> None:
        """Sends what was put off, for SENDING_SECONDS at most: to find that a client has left takes long."""
        deadline = self.clock() + SENDING_SECONDS
        while self.outbox and self.clock() <= deadline:
            self.outbox.popleft().end_turn()

    def stop(self) -> None:
        """Ends all tasks, and the loop."""
        while self.outbox:
            self._end_turn()
        for task in list(self.tasks):
            task.cancel()
        self._stopped = True

    def _on_wakeup(self, events: int) -> None:
        self._wakeup_reader.recv(4096)
        self._wakeup_pending = False

    def _sweep(self) -> None:
        """Resumes the tasks that are overdue, for SWEEPING_SECONDS at most, however late the turn is; has clients with
        full buffers looked at; decides when to look again."""
        self.sweep_at = self.now + SWEEP_SECONDS
        due: list[Task] = []
        full: list[Task] = []
        for task in list(self.tasks):
            client = task.client
            if task.deadline <= self.now and not task.unseen:
                due.append(task)
            elif client and client.is_full and not client.closed:
                full.append(task)
        self._resume_overdue(due)
        self._look_for_departed(full)
        waiting = (task.deadline for task in self.tasks if task.deadline > self.now or not task.unseen)
        soonest = min(self.sweep_at, min(waiting, default=math.inf), self._look_at if full else math.inf)
        self.sweep_at = max(self.now + TICK_SECONDS, soonest)

    def _look_for_departed(self, full: Sequence[Task]) -> None:
        """Has it looked every AHEAD_SECONDS whether the clients of these tasks have left, which nothing else tells: in
        the turns of their origins, and at all of them before any is looked at again."""
        if self.now < self._look_at:
            return
        self._look_at = self.now + AHEAD_SECONDS
        by_origin: collections.defaultdict[str, list[Task]] = collections.defaultdict(list)
        for task in () if self._unlooked else full:
            by_origin[task.origin].append(task)
        for tasks in by_origin.values():
            self._look_in_turn(tasks)

    def _look_in_turn(self, tasks: list[Task]) -> None:
        self.slow.clients.put(lambda: self._resume_departed(tasks), tasks[0].origin)
        self._unlooked += 1  # once they wait: there may be no memory for that

    def _resume_departed(self, tasks: list[Task]) -> None:
        """Resumes those tasks of an origin whose client has left, for SLOW_EVENT_SECONDS at a time."""
        self._unlooked -= 1
        latest = self.clock() + SLOW_EVENT_SECONDS
        while tasks and self.clock() <= latest:
            task = tasks.pop()
            client = task.client
            if client and client.is_full and not client.closed and client.has_hung_up():
                task.resume(ClientGone())
        if tasks:
            self._look_in_turn(tasks)

    def _resume_overdue(self, due: list[Task]) -> None:
        """Raises Overdue in these tasks, in turns, the longest overdue ones of an origin first; those that
        SWEEPING_SECONDS don't suffice for are due in the next turn, too."""
        queue, latest = FairQueue(), self.clock() + SWEEPING_SECONDS
        for task in sorted(due, key=lambda task: task.deadline):
            queue.put(functools.partial(self.resume_if_overdue, task), task.origin)
        while queue and self.clock() <= latest:
            queue.take()()

    def resume_in_turn(self, task: Task) -> None:
        """Resumes a task for which something has come, in the turns of its origin: it may go on for long, and new
        connections don't wait for that. Its deadline isn't told before."""

        def go_on() -> None:
            task.unseen -= 1
            task.resume()

        self.patient.put(go_on, task.origin)
        task.unseen += 1  # once it waits: there may be no memory for that

    def resume_if_overdue(self, task: Task) -> None:
        """Raises Overdue in a task if its deadline has passed. Not where what it waits for may have come, and only the
        loop is late with it: no provider is to blame for that."""
        if task.deadline <= self.now and not task.unseen:
            task.resume(Overdue())


def describe(error: BaseException) -> str:
    """An unexpected error for the log: its type and place, no text of it, which might hold a secret."""
    place = error.__traceback__
    while place and place.tb_next:
        place = place.tb_next
    return f"{type(error).__name__} in line {place.tb_lineno if place else 0}"


@types.coroutine
def until(deadline: float = math.inf) -> Generator[float, None, None]:
    """Waits until something may have happened to what the running task waits for. Raises Overdue at the deadline, on
    the loop's clock, and ClientGone when its client has left."""
    yield deadline


async def checkpoint(loop: EventLoop, queue: Optional[FairQueue] = None) -> None:
    """Lets all other tasks that can run do so first, or those in a queue of the loop. Events on this task's channels
    don't end the wait."""
    task, its_turn = loop.current, False

    def go_on() -> None:
        nonlocal its_turn
        its_turn = True
        task.resume()

    (loop.patient if queue is None else queue).put(go_on, task.origin)
    while not its_turn:
        await until()


async def in_steps(loop: EventLoop, items: Iterable[Item]) -> AsyncIterator[Item]:
    """The items. Lets all other tasks run whenever SLOW_EVENT_SECONDS have gone by with them."""
    begun = loop.clock()
    for item in items:
        if loop.clock() - begun > SLOW_EVENT_SECONDS:
            await checkpoint(loop)
            begun = loop.clock()
        yield item


async def sleep(loop: EventLoop, seconds: float) -> None:
    """Waits for so many seconds."""
    deadline = loop.now + seconds
    try:
        while True:
            await until(deadline)
    except Overdue:
        pass


async def repeat(loop: EventLoop, action: Action, seconds: float) -> None:
    """Calls the action again and again, for as long as the loop runs. One that fails, by a defect or for lack of
    memory, is called again all the same."""
    while True:
        try:
            action()
        except Exception as fault:
            loop.warn(f"internal error: {describe(fault)}")
        await sleep(loop, seconds)


class Worker:
    """A thread that runs calls one by one, those of different callers in turns. It starts with the first call."""

    def __init__(self) -> None:
        self._waiting = FairQueue()
        self._queued = threading.Condition()  # guards what waits, and tells of more
        self._begun = False
        self.is_busy = False  # whether a call runs

    def call(self, run: Action, caller: str = "") -> None:
        """Queues a call. Raises RuntimeError when no thread can be started."""
        if not self._begun:
            serve_in_thread("worker", self._run)
            self._begun = True
        with self._queued:
            self._waiting.put(run, caller)
            self._queued.notify()

    def _run(self) -> None:
        while True:
            self.is_busy = False
            with self._queued:
                self._queued.wait_for(self._waiting.__len__)
                run = self._waiting.take()
            self.is_busy = True
            run()
            del run  # else what it holds would be kept until the next call


def outlast_shortage(run: Callable[[], Result]) -> Result:
    """What run() returns, which is called again where there was no memory for it: what serves must go on."""
    while True:
        try:
            return run()
        except NO_MEMORY:
            time.sleep(TICK_SECONDS)


def serve_in_thread(name: str, run: Callable[[], None]) -> threading.Thread:
    """A thread that serves for as long as run() does. Raises RuntimeError when the system gives out no more threads."""
    thread = threading.Thread(target=outlast_shortage, args=(run,), name=name, daemon=True)
    thread.start()
    return thread


async def in_thread(
    loop: EventLoop, work: Callable[[], Result], worker: Optional[Worker], caller: str = "", deadline: float = math.inf
) -> Result:
    """The result of work(), called by a worker in the turn of a caller or the task's origin, else in a thread of its
    own; not if the task waits no more by then. Raises what that raises, Overdue, and Unavailable without a thread."""
    task = loop.current
    outcome: list[tuple[Any, Optional[Exception]]] = []
    wanted = [work]  # emptied when the task waits no more: run(), which may be queued for long, then holds no body

    def run() -> None:
        if not wanted:
            return
        try:
            outcome.append((wanted[0](), None))
        except Exception as fault:
            outcome.append((None, fault))
        loop.post(functools.partial(loop.resume_in_turn, task))
        if not wanted:
            outcome.clear()  # else an error, its traceback and this frame would keep each other, and a body

    try:
        if worker:
            worker.call(run, caller or task.origin)
        else:
            threading.Thread(target=run, name="worker", daemon=True).start()
    except RuntimeError:
        raise Unavailable("this relay has no thread left for this", "no_threads") from None
    result: Result
    fault: Optional[Exception] = None
    try:
        while not outcome:
            await until(deadline)
        result, fault = outcome.pop()
        if fault:
            raise fault
        return result
    finally:
        wanted.clear()
        outcome.clear()
        fault = None  # else its traceback and this frame would keep each other, and all that work() has used


# ==== Writers =======================================================================================
#
# The log has a thread of its own: a terminal or a pipe that takes nothing must not hold up the serving. What waits is
# bounded in lines and bytes. Lines beyond that, and those that can't be written, are dropped and counted.
#
# So has the ledger, an SQLite file: one table with a row for each request, and two with their sums, `hour` for whoever
# wants to know what was used, and `spent` for budgets. All three are written in one transaction, and rows are forgotten
# only when that is committed. The file is opened anew each time: nothing is open across a fork, its owner may move it,
# and other workers and relays may write it, too. It has a rollback journal, and no write-ahead log, unless another
# program insists: of that, SQLite up to 3.51.2 may corrupt a file to which two connections write.


# For a terminal of the usual width.
BANNER_LINE = textwrap.TextWrapper(80, subsequent_indent=" " * 13, break_long_words=False, break_on_hyphens=False)


class LogWriter:
    """Writes lines to stderr from a thread of its own: a log that is slow, or gone, holds up nobody."""

    def __init__(self, stream: Optional[IO[str]], style: str = "text") -> None:
        self._stream = stream
        self._lines: collections.deque[str] = collections.deque()
        self._size = 0  # characters of the lines, about: several threads add to it
        self._wanted = threading.Event()
        self._lock = threading.Lock()  # guards the order of writes
        self.style = style
        self.dropped = 0  # since that was last told
        self._is_refused = False  # whether some of these could not be written
        self.dropped_in_all = 0

    def start(self) -> None:
        """Starts the thread."""
        serve_in_thread("log", self._run)

    def record(self, record: AccessRecord, now: float) -> None:
        """Takes the line of a request that ends now."""
        if self.style != "off":
            self.write(record.line(now, self.style))

    def say(self, message: str, level: str = "info") -> None:
        """Takes a line of the relay's own."""
        self.write(self._line(message, level))

    def warn(self, message: str) -> None:
        """Takes a warning."""
        self.say(message, "warning")

    def announce(self, lines: Sequence[str]) -> None:
        """Takes the lines of the banner, wrapped; commands, which have several lines already, stay as they are. None is
        cut, since what is left of a command is none."""
        if self.style == "json":
            opening = {"time": f"{utc_time(int(time.time()))}Z", "level": "info"}
            for line in lines:
                self.write(json.dumps({**opening, "message": " ".join(line.replace("\\\n", "").split())}))
        elif lines:
            self.write("\n".join(line if "\n" in line else BANNER_LINE.fill(line) for line in lines))

    def write(self, line: str) -> None:
        """Takes a line as it is, if there is room."""
        if len(self._lines) < LOG_BACKLOG_LINES and self._size < LOG_BACKLOG_CHARACTERS:
            self._lines.append(line)
            self._size += len(line)
        else:
            self.dropped += 1
            self.dropped_in_all += 1
        self._wanted.set()

    def finish(self) -> None:
        """Waits up to LOG_LAST_SECONDS for the thread to write the last lines."""
        deadline = time.monotonic() + LOG_LAST_SECONDS
        while self._lines and time.monotonic() < deadline:
            time.sleep(LOG_PAUSE_SECONDS / 10)
        if self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            self._lock.release()

    def _line(self, message: str, level: str) -> str:
        clock = f"{utc_time(int(time.time()))}Z"
        if self.style == "json":
            return log_json({"time": clock, "level": level, "message": message})
        return f"time={clock} level={level} message={log_text(message)}"

    def _flush(self) -> None:
        """Writes what is waiting."""
        with self._lock:
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            self._size = 0
            count, dropped = len(lines), self.dropped
            if dropped:
                why = "could not be written" if self._is_refused else "was not taken fast enough"
                lines.append(self._line(f"{dropped} lines of the log were dropped: it {why}", "warning"))
                self.dropped, self._is_refused = 0, False
            if self._stream and lines:
                try:
                    write_text(self._stream, "\n".join(lines) + "\n")
                except (OSError, ValueError):  # a closed or full log must not stop the serving
                    self.dropped, self._is_refused = self.dropped + count + dropped, True
                    self.dropped_in_all += count

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            self._flush()
            time.sleep(LOG_PAUSE_SECONDS)


def write_text(stream: IO[str], text: str) -> None:
    """Writes the whole text, past the stream's own buffer and lock where it is a file: a thread that is held up in
    there must hold up neither the end of the process nor a fork of it. As many lines at a time as a pipe takes in one
    piece, or other workers' might come to stand within one. Raises OSError and ValueError."""
    try:
        descriptor = stream.fileno()
    except OSError:
        stream.write(text)
        return
    data = text.encode(getattr(stream, "encoding", None) or "ascii", "backslashreplace")
    begin = 0
    while begin < len(data):
        end = data.rfind(b"\n", begin, begin + PIPE_BYTES) + 1 or data.find(b"\n", begin) + 1 or len(data)
        try:
            begin += os.write(descriptor, data[begin:end])
        except BlockingIOError:  # another program that has it, too, has set it not to block
            time.sleep(LOG_PAUSE_SECONDS)


NO_SQLITE = "ledger: this Python has no sqlite3; nothing is kept"
LEDGER_VERSION = 1
LEDGER_SCHEMA = f"""
PRAGMA user_version = {LEDGER_VERSION};
CREATE TABLE request (
  id INTEGER PRIMARY KEY, at INTEGER NOT NULL,
  request TEXT NOT NULL, user TEXT NOT NULL, model TEXT, sent TEXT, provider TEXT, key TEXT,
  path TEXT, status INTEGER, stream INTEGER, attempts INTEGER, ttfb INTEGER, duration INTEGER,
  input INTEGER, cache_read INTEGER, cache_write INTEGER, cache_write_long INTEGER, output INTEGER,
  tier TEXT, cost INTEGER,
  complete INTEGER NOT NULL, error TEXT, tried TEXT);
CREATE INDEX request_at ON request (at);
CREATE TABLE hour (
  hour INTEGER, user TEXT, model TEXT, provider TEXT, key TEXT,
  requests INTEGER, errors INTEGER, untold INTEGER,
  input INTEGER, cache_read INTEGER, cache_write INTEGER, cache_write_long INTEGER, output INTEGER,
  cost INTEGER, ttfb INTEGER, streamed INTEGER, duration INTEGER,
  PRIMARY KEY (hour, user, model, provider, key)) WITHOUT ROWID;
CREATE TABLE spent (
  user TEXT, window TEXT, cost INTEGER, tokens INTEGER, PRIMARY KEY (user, window)) WITHOUT ROWID
"""
INSERT_REQUEST = f"""
INSERT INTO request ({", ".join(LedgerRow._fields)}) VALUES ({", ".join("?" * len(LedgerRow._fields))})"""
ADD_HOUR = f"""
INSERT INTO hour (hour, user, model, provider, key, {", ".join(SUMS)}) VALUES ({", ".join("?" * (5 + len(SUMS)))})
ON CONFLICT (hour, user, model, provider, key) DO UPDATE SET
{", ".join(f"{name} = coalesce({name} + excluded.{name}, {name}, excluded.{name})" for name in SUMS)}"""
ADD_SPENT = """
INSERT INTO spent (user, window, cost, tokens) VALUES (?, ?, ?, ?)
ON CONFLICT (user, window) DO UPDATE SET cost = cost + excluded.cost, tokens = tokens + excluded.tokens"""
# Each takes a bounded time, and the next transaction goes on where it ends. Freed pages are used again.
SWEEP_REQUESTS = f"""
DELETE FROM request WHERE id IN (SELECT id FROM request WHERE at < ? ORDER BY at LIMIT {LEDGER_SWEPT_ROWS})"""
SWEEP_HOURS = "DELETE FROM hour WHERE hour < ? AND hour = (SELECT min(hour) FROM hour)"
SWEEP_SPENT = "DELETE FROM spent WHERE user = ? AND window < ?"


class LedgerWriter:
    """Writes rows to the ledger from a thread of its own: a file that is slow, locked or full holds up nobody."""

    def __init__(self, warn: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._warn = warn
        self._clock = clock
        self._settings: Optional[LedgerSettings] = None  # of the file that the waiting rows go to
        self._keeping = False  # whether rows are taken
        self._limited: frozenset[str] = frozenset()  # the users with budgets
        self._rows: collections.deque[LedgerRow] = collections.deque()
        self._wanted = threading.Event()
        self._ending = threading.Event()
        self._started = False
        self._thread: Optional[threading.Thread] = None
        self._lock = threading.Lock()  # guards _limited, _rows and the next three: several threads ask and add
        self._spent: Spent = {}  # by users with budgets, as last read from the file
        self._unwritten: Spent = {}  # the same by their rows that wait or were dropped
        self._lost: Spent = {}  # the same by the dropped ones alone
        self._carried: Spent = {}  # what was read from a file that is broken, for the new one
        self.elsewhere: dict[int, Spent] = {}  # what other workers have shared(), by their place
        self.changed: Callable[[], object] = lambda: None  # called when shared() has changed
        self._warned_at = -math.inf
        self.dropped = 0  # rows, since the start
        self._dropped_told = 0
        self.failing = False  # whether the file could not be written when last tried, or takes too long for others
        self._late_at = math.inf  # from when on it does
        self._offset = time.time() - clock()  # of the time by which what is too old is swept
        self._believed_at = math.inf  # when the system's clock, which has jumped ahead, is that time again

    @property
    def waiting(self) -> int:
        """How many rows aren't written yet."""
        return len(self._rows)

    @property
    def file(self) -> str:
        """The file that keeps the rows; empty if nothing does."""
        return self._settings.path if self._settings and self._keeping else ""

    def use(self, config: Config) -> None:
        """Writes where this configuration says, from the next transaction on."""
        self._keeping = bool(config.ledger and sqlite3)
        self._settings = config.ledger or self._settings
        with self._lock:
            self._limited = frozenset(user.name for user in config.users.values() if user.has_budget and self._keeping)
            self._unwritten = dict(self._lost)
            add_spent(self._unwritten, spent_sums([row for row in self._rows if row.user in self._limited]))
        self._wanted.set()
        if self._started:
            self.start()

    def start(self) -> None:
        """Where there is a ledger, reads what was spent before, and starts the thread. Raises RuntimeError when the
        system gives out none."""
        self._started = True
        if self._keeping and not self._thread:
            self._flush()
            self._thread = serve_in_thread("ledger", self._run)

    def put(self, row: LedgerRow) -> None:
        """Queues a row. When too many wait, it is dropped, and only what it has cost is kept."""
        if not self._keeping:
            return
        has_room = len(self._rows) < LEDGER_BACKLOG_ROWS
        with self._lock:
            spent = spent_sums((row,)) if row.user in self._limited else {}
            add_spent(self._unwritten, spent)
            if has_room:
                self._rows.append(row)
            else:
                self.dropped += 1
                add_spent(self._lost, spent)
        if spent and (self.failing or not has_room):
            self.changed()
        self._wanted.set()

    def note_delay(self) -> None:
        """Shows others what waits for a write that takes too long for them."""
        if not self.failing and self._clock() > self._late_at:
            self.failing = True
            self.changed()

    def spent(self, user: str, window: str) -> tuple[int, int]:
        """What a user with a budget has spent in a window: 10^-9 USD, and tokens without those read from a cache."""
        with self._lock:
            known = (self._spent, self._unwritten, *self.elsewhere.values())
            found = [sums.get((user, window), (0, 0)) for sums in known]
        return sum(cost for cost, _ in found), sum(tokens for _, tokens in found)

    def shared(self) -> list[tuple[tuple[str, str], tuple[int, int]]]:
        """What users with budgets have spent that other workers can't read in the file."""
        with self._lock:
            return list((self._unwritten if self.failing else self._lost).items())

    def finish(self) -> None:
        """Waits up to LEDGER_LAST_SECONDS for the thread to write the last rows."""
        self._ending.set()
        self._wanted.set()
        if self._thread:
            self._thread.join(LEDGER_LAST_SECONDS)
        if self._rows:
            self._warn(f"{len(self._rows)} rows of the ledger are lost: it could not be written")

    def _run(self) -> None:
        """Writes once a second as long as something is waiting, and all of it at the end."""
        while self._rows or not self._ending.is_set():
            # Other workers serve the users with budgets, too: what these have spent is read each second.
            if not self._rows and not self._limited:
                self._wanted.wait()
            self._wanted.clear()
            while self._flush() and (len(self._rows) >= LEDGER_BATCH_ROWS or (self._rows and self._ending.is_set())):
                pass
            if self._ending.wait(LEDGER_PAUSE_SECONDS):
                time.sleep(LEDGER_PAUSE_SECONDS / 50)

    def _flush(self) -> bool:
        """Writes a batch of the rows that wait, and reads what was spent; whether both succeeded. A row is taken off
        only when it is committed, so that no failure loses it."""
        settings = self._settings
        with self._lock:
            batch = list(itertools.islice(self._rows, LEDGER_BATCH_ROWS))
        if not settings or not (batch or self._limited):
            return True
        seen = file_state(settings.path)
        self._late_at = self._clock() + LEDGER_LOCK_SECONDS
        try:
            # Without its folder, or that of the file to which it is a link, the file isn't new, but out of reach: what
            # was spent is still in it, and writing fails.
            folder = os.path.dirname(os.path.realpath(settings.path))
            if batch or self._carried or not os.access(folder, os.X_OK):
                spent = write_ledger(settings, batch, self._limited, time.time(), self._carried, self._believed_time())
            else:
                users, now = self._limited, time.time()
                spent = read_ledger(settings.path, lambda connection: select_spent(connection, users, now)) or {}
        except Exception as error:
            self._set_failing(True)
            self._note_failure(settings.path, seen, error)
            return False
        self._set_failing(False)
        self._carried = {}
        with self._lock:
            self._spent = spent
            for key, (cost, tokens) in spent_sums([row for row in batch if row.user in self._limited]).items():
                before = self._unwritten.pop(key)
                if before != (cost, tokens):
                    self._unwritten[key] = before[0] - cost, before[1] - tokens
            for _ in batch:
                self._rows.popleft()
        if self.dropped > self._dropped_told:
            self._warn(f"{self.dropped - self._dropped_told} rows of the ledger were dropped: too many waited for it")
            self._dropped_told = self.dropped
        return True

    def _believed_time(self) -> float:
        """The time by which what is too old is swept, which can't be undone: a clock that has jumped ahead is believed
        only when it stays so."""
        clock = self._clock()
        offset = time.time() - clock
        if offset < self._offset + LEDGER_JUMP_SECONDS or clock > self._believed_at:
            self._offset, self._believed_at = offset, math.inf
        else:
            self._believed_at = min(self._believed_at, clock + LEDGER_BELIEVED_SECONDS)
        return clock + self._offset

    def _set_failing(self, failing: bool) -> None:
        self._late_at = math.inf
        if failing != self.failing:
            self.failing = failing
            self.changed()

    def _note_failure(self, path: str, seen: tuple[int, ...], error: Exception) -> None:
        """Renames a broken file to make room for a new one; of any other failure warns, once a minute."""
        if is_broken(error):
            kept = set_aside(path, seen)
            if kept:
                self._carried = self._spent
                self._warn(f"the ledger {path} is broken ({error}); it is kept as {kept}, and a new one is begun")
                return
        now = self._clock()
        if now - self._warned_at >= WARNING_SECONDS:
            self._warned_at = now
            self._warn(f"the ledger {path} can't be written: {error}; {len(self._rows)} rows wait for it")


def write_ledger(
    settings: LedgerSettings, rows: list[LedgerRow], users: Iterable[str], now: float, carried: Spent, believed: float
) -> Spent:
    """Adds the rows to the file and its sums, and drops what is too old, in one transaction; what these users have
    spent by then. `carried`: what they had spent by the file in whose place it comes; `believed`: by which time it is
    too old. Raises sqlite3.Error, and ValueError for a file of a newer version."""
    rows = [LedgerRow._make(map(storable, row)) for row in rows]
    connection = sqlite3.connect(settings.path, timeout=LEDGER_LOCK_SECONDS, isolation_level=None)
    with contextlib.closing(connection):  # which undoes what isn't committed
        use_rollback_journal(connection)
        connection.execute("BEGIN IMMEDIATE")
        if not ledger_version(connection):
            for statement in LEDGER_SCHEMA.split(";"):
                connection.execute(statement)
        connection.executemany(INSERT_REQUEST, rows)
        find_models = functools.partial(select_models, connection)
        connection.executemany(ADD_HOUR, [(*key, *sums) for key, sums in hour_sums(rows, find_models).items()])
        for more in (spent_sums(rows), carried):
            connection.executemany(ADD_SPENT, [(*map(storable, key), *sums) for key, sums in more.items()])
        connection.execute(SWEEP_REQUESTS, (int((believed - settings.keep_days * 86400) * 1000),))
        oldest = believed - LEDGER_SUMS_DAYS * 86400
        connection.execute(SWEEP_HOURS, (int(oldest // 3600),))
        connection.executemany(SWEEP_SPENT, [(user, windows(oldest)[0]) for user in {row.user for row in rows}])
        spent = select_spent(connection, users, now)
        connection.execute("COMMIT")
        return spent


def use_rollback_journal(connection: Any) -> None:
    """Sets a rollback journal, unless another program, such as Litestream, holds the file in WAL mode: then no row
    could be written without the write-ahead log. Raises sqlite3.Error."""
    try:
        connection.execute("PRAGMA journal_mode = TRUNCATE")
    except sqlite3.OperationalError:
        if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
            raise


def read_ledger(path: str, read: Callable[[Any], Any]) -> Any:
    """What is read by a connection that writes nothing; None where there is no file yet. Raises sqlite3.Error, and
    ValueError for a file of a newer version."""
    if not os.path.exists(path):
        return None
    # With mode=ro it could not undo what a process has left that died while writing, and so not read it.
    # SQLite decodes the address to the bytes of the name, which aren't UTF-8 everywhere.
    address = f"file:{quote(os.fsencode(os.path.abspath(path).replace(os.sep, '/')))}?mode=rw"
    connection = sqlite3.connect(address, uri=True, timeout=LEDGER_LOCK_SECONDS, isolation_level=None)
    with contextlib.closing(connection):
        connection.execute("PRAGMA query_only = 1")
        return read(connection) if ledger_version(connection) else None


def ledger_version(connection: Any) -> int:
    """The version of the file's tables, 0 for a file without any. Raises ValueError for one that isn't known here."""
    # In one query: another process may begin the tables between two.
    query = "SELECT user_version, EXISTS (SELECT 1 FROM sqlite_master) FROM pragma_user_version"
    version, has_tables = map(int, connection.execute(query).fetchone())
    if version > LEDGER_VERSION:
        raise ValueError(f"a newer MonoRelay has made it (version {version}, this one knows {LEDGER_VERSION})")
    if has_tables and not version:
        raise ValueError("another program has made it; name another file in ledger.path")
    return version


def select_models(connection: Any, hour: int, user: str) -> list[str]:
    """The models of a user in an hour."""
    query = "SELECT DISTINCT model FROM hour WHERE hour = ? AND user = ?"
    return [model for (model,) in connection.execute(query, (hour, user))]


def select_spent(connection: Any, users: Iterable[str], now: float) -> Spent:
    """What these users have spent today and this month."""
    query = "SELECT cost, tokens FROM spent WHERE user = ? AND window = ?"
    asked = [(user, window) for user in users for window in windows(now)]
    found = {key: connection.execute(query, (storable(key[0]), key[1])).fetchone() for key in asked}
    return {key: (int(row[0]), int(row[1])) for key, row in found.items() if row}


# Queries, for a thread that may wait for the file: sums are read from `hour`, and never made from `request`.

# What SQLite says where it can't sort in a file: a container may have no directory that it may write such to, or no
# room there. It sorts in memory then.
NO_TEMPORARY_FILE = re.compile("disk I/O error|unable to open|disk is full")


# What one user used, hour by hour. Each hour in which anybody used something is looked up by itself, so that the time
# grows with the number of hours, not with the number of users.
HOURS_OF_ONE = """(WITH RECURSIVE used (at) AS (
  SELECT min(hour) FROM hour WHERE hour >= :since AND hour < :until
  UNION ALL SELECT (SELECT min(hour) FROM hour WHERE hour > at AND hour < :until) FROM used WHERE at IS NOT NULL)
SELECT hour.* FROM used CROSS JOIN hour ON hour = at AND user = :user)"""


def summed_usage(path: str, since: int, until: int, by: Sequence[str], user: Optional[str]) -> Groups:
    """What was used from one hour up to another, in hours since 1970, the second not included: the names and the SUMS
    of each group by the columns `by` (some of GROUPS); of one user if named; dear ones first. Raises sqlite3.Error, and
    ValueError for what can't be grouped by."""
    if not set(by) <= set(GROUPS):
        raise ValueError(f"it can be grouped by {', '.join(GROUPS)}")
    query = f"SELECT {', '.join([*by, *(f'sum({name})' for name in SUMS)])} FROM "
    query += "hour WHERE hour >= :since AND hour < :until" if user is None else HOURS_OF_ONE
    query += f" GROUP BY {', '.join(by)}" if by else ""
    query += f" ORDER BY sum(cost) DESC, sum(requests) DESC LIMIT {LEDGER_GROUPS}"
    found = query_ledger(path, query, {"since": since, "until": until, "user": storable(user)})
    groups = [(dict(zip(by, row)), list(row[len(by) :])) for row in found]
    return [(group, sums) for group, sums in groups if sums[0]]  # without a group, there is a row of nothing


def daily_usage(path: str, since: int, until: int, by: Sequence[str], user: Optional[str]) -> Iterator[Groups]:
    """The same day by day, each in a query of its own: while one lasts, nobody can write."""
    find_next = "SELECT min(hour) FROM hour WHERE hour >= ? AND hour < ?"
    while True:
        found = query_ledger(path, find_next, (since, until))
        if not found or found[0][0] is None:
            return
        day = found[0][0] // 24
        since = (day + 1) * 24
        groups = summed_usage(path, found[0][0], min(since, until), by, user)
        yield [({"day": windows(day * 86400)[0], **group}, sums) for group, sums in groups]


def with_list(document: JsonDict, written: list[bytes]) -> bytes:
    """The document as JSON, with these values, which may be changed, in its one empty list. They are copied once: that
    takes 20 ms for 30 MB, in which nothing else runs."""
    before, _, after = json.dumps(document).encode("ascii").partition(b"[]")
    written = written or [b""]
    written[0] = before + b"[" + written[0]
    written[-1] += b"]" + after
    return b", ".join(written)


def usage_body(about: JsonDict, groups: Groups, total: Groups) -> bytes:
    """What was used by each group, and in all, as JSON: row by row, since nothing else runs while `json` writes one.
    `total`: grouped by nothing, with what LEDGER_GROUPS leave out, which `cut` tells; empty if there is nothing."""
    rows = [json.dumps(usage_row(group, sums)).encode("ascii") for group, sums in groups]
    about = {**about, "cut": True} if len(groups) >= LEDGER_GROUPS else about
    last = usage_row({}, total[0][1] if total else [0] * len(SUMS))
    return with_list({**about, "rows": [], "total": last}, rows)


def usage_row(group: Mapping[str, str], sums: Sums) -> JsonDict:
    """The names of a group and its sums, for people: USD, and the mean times in seconds."""
    figures: JsonDict = dict(zip(SUMS, sums))
    cost, ttfb, streamed, duration = (figures.pop(name) for name in ("cost", "ttfb", "streamed", "duration"))
    return {
        **group,
        **figures,
        "usd": None if cost is None else cost / 10**9,
        "ttfb": round(ttfb / streamed / 1000, 3) if streamed else None,
        "seconds": round(duration / figures["requests"] / 1000, 3) if figures["requests"] else None,
    }


# A provider and its key are joined only where both may be meant: that takes longer than all the rest.
FIND_REQUESTS = f"""
SELECT id, {", ".join(LedgerRow._fields)} FROM request WHERE id < :below AND id >= :end
AND (:user IS NULL OR user = :user) AND (:model IS NULL OR sent = :model OR model = :model)
AND (:key IS NULL OR :key = key OR length(:key) = length(provider) + length(key) + 1
  AND instr(:key, key) AND instr(:key, provider) AND :key = provider || '/' || key)
AND (NOT :errors OR status >= 400 OR coalesce(error, 'client_gone') NOT IN ('', 'client_gone'))
ORDER BY id DESC LIMIT :limit"""


def request_page(
    path: str, before: int = 2**62, limit: int = 200, errors: bool = False, **wanted: str
) -> tuple[list[JsonDict], Optional[int]]:
    """The requests before the one with an id, newest first, by the names of their columns, and the id to ask for more
    by; None where there are no more. They are those `wanted` of a user, of a model as it was asked for or sent, or with
    a key as label or provider/label. Looks through LEDGER_SEARCHED_ROWS and no more. Raises sqlite3.Error."""
    newest = query_ledger(path, "SELECT coalesce(max(id), 0) FROM request", ())
    below = min(before, newest[0][0] + 1 if newest else 1)
    end, limit = below - LEDGER_SEARCHED_ROWS, max(1, min(limit, ROWS_AT_ONCE))
    asked = {name: storable(wanted.get(name)) for name in ("user", "model", "key")}
    found = query_ledger(path, FIND_REQUESTS, {**asked, "below": below, "end": end, "limit": limit, "errors": errors})
    rows = [dict(zip(("id", *LedgerRow._fields), row)) for row in found]
    end = rows[-1]["id"] if len(rows) == limit else end
    older = query_ledger(path, "SELECT id FROM request WHERE id < ? LIMIT 1", (end,))
    return rows, end if older else None


def requests_body(rows: Iterable[JsonDict], following: Optional[int]) -> bytes:
    """A page of requests as JSON: row by row, since nothing else runs while `json` writes one, and some have 7 kB."""
    return with_list({"rows": [], "next": following}, [json.dumps(row).encode("ascii") for row in rows])


def hour_rows(path: str, since: int, user: Optional[str]) -> list[list[Any]]:
    """The hours since one, by their number since 1970, and SUMS of each; of one user if named. Raises sqlite3.Error."""
    query = f"SELECT hour, {', '.join(f'sum({column})' for column in SUMS)} FROM hour"
    query += " WHERE hour >= :since AND (:user IS NULL OR user = :user) GROUP BY hour ORDER BY hour"
    return [list(row) for row in query_ledger(path, query, {"since": since, "user": storable(user)})]


def query_ledger(path: str, query: str, values: Union[Sequence[Any], JsonDict]) -> list[Any]:
    """What a query finds; nothing where there is no file yet. Raises what read_ledger() does."""

    def find(connection: Any) -> list[Any]:
        try:
            return list(connection.execute(query, values).fetchall())
        except sqlite3.OperationalError as error:
            if not NO_TEMPORARY_FILE.search(str(error)):
                raise
        connection.execute("PRAGMA temp_store = MEMORY")
        return list(connection.execute(query, values).fetchall())

    return read_ledger(path, find) or []


def storable(value: Any) -> Union[str, int, None]:
    """The value as SQLite takes it: text without half surrogate pairs, a whole number of 64 bits."""
    if isinstance(value, str):
        is_plain = len(value) <= MODEL_CHARACTERS and value.isascii()
        return value if is_plain else value[:MODEL_CHARACTERS].encode("utf-8", "replace").decode("utf-8")
    return value if isinstance(value, int) and -(2**63) <= value < 2**63 else None


def begins_as_database(path: str) -> bool:
    """Whether a file begins as those of SQLite do, or is empty. True for what can't be read: writing it will tell what
    is wrong."""
    magic = b"SQLite format 3\0"
    try:
        with open(path if os.path.isfile(path) else os.devnull, "rb") as file:  # a pipe would be waited for
            return magic.startswith(file.read(len(magic)))
    except OSError:
        return True


def is_broken(error: Exception) -> bool:
    """Whether SQLite reports that a file is no database, or a malformed one."""
    return type(error) is sqlite3.DatabaseError and bool(re.search("malformed|not a database", str(error)))


def set_aside(path: str, seen: tuple[int, ...]) -> str:
    """Renames a broken file, unless another process has already done that; its new name, or nothing."""
    kept = f"{path}.broken-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    try:
        if not seen or file_state(path)[2:4] != seen[2:4]:
            return ""
        os.replace(path, kept)
        if os.path.exists(f"{path}-journal"):
            os.replace(f"{path}-journal", f"{kept}-journal")
    except OSError:
        return ""
    return kept


def file_state(path: str) -> tuple[int, ...]:
    """Time and size of a file, which change when it is edited, device and inode, when it is replaced, and when it was
    changed at all, which may have made it readable; empty if there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return ()
    return found.st_mtime_ns, found.st_size, found.st_dev, found.st_ino, found.st_ctime_ns


# ==== Request body ==================================================================================
#
# The body of a client's request, read as it comes. What all of them hold together is bounded: the bytes are counted as
# they arrive, decompressed ones too, and given back when the response has begun. Long answers that are made here, such
# as the list of models, are counted with them until they are sent.


class HeldBodies:
    """How many bytes of bodies are held to be sent: all together, and each user's."""

    def __init__(self) -> None:
        self.limit = 0
        self.bytes = 0
        self.released = 0  # since this was last set to 0
        self._by_user: dict[str, int] = {}

    def claim(self, count: int, user: str, own: int) -> None:
        """Takes room for so many bytes more of a request that holds `own`. Several requests of a user get three
        quarters of what nobody else has taken, so that there is room for others; the owner, no user, gets all of it.
        Raises Unavailable."""
        left = self.limit - self.bytes - count
        if left < 0:
            raise bodies_full("this relay holds as many bytes of bodies as it may")
        if user:
            before = self._by_user.get(user, 0)
            if before > own and before + count > 3 * left:
                raise bodies_full(f"the requests of {user} hold as many bytes as they may beside those of others")
            self._by_user[user] = before + count
        self.bytes += count

    def release(self, count: int, user: str) -> None:
        """Gives the room back."""
        self.bytes -= count
        self.released += count
        if user:
            self._by_user[user] -= count
            if not self._by_user[user]:
                del self._by_user[user]


def bodies_full(what: str) -> Unavailable:
    """The error for a body that there is no room for."""
    return Unavailable(f"{what} (server.max_held_mb); try again", "bodies_full")


class RequestBody:
    """The body of a request, to be read in pieces as they arrive."""

    def __init__(self, channel: Channel, head: RequestHead, limit: int, loop: EventLoop, setting: str = "") -> None:
        self.length = self._announced = head.body_length
        self._chunks = ChunkedDecoder() if head.body_length is None else None
        self._decoder: Decoder = self._chunks or LengthDecoder(head.body_length or 0)
        self._channel, self._loop = channel, loop
        self._limit = limit
        self._setting = setting  # of relay.json, which the limit comes from
        self._taken = 0  # bytes of content, where the length isn't known
        self._latest = math.inf  # the deadline of the whole body
        self.watch: Optional[Callable[[bytes], object]] = None  # sees each piece as it comes
        self.waited: Callable[[], object] = lambda: None  # called when it had to be waited for
        self.begun = self._ahead = b""  # what was read of a form to know its model; what of that is to be read again
        self._model_span = 0, 0  # where the model stands in it
        self.is_spent = False  # whether some of it was passed on, so that it can't be sent again
        self._sends_continue = head.fields.get("expect", "").lower() == "100-continue" and head.version >= 1
        if (self.length or 0) > limit:
            raise self._too_large()

    @property
    def finished(self) -> bool:
        """Whether it has been read to its end."""
        return self._decoder.finished and not self._ahead

    @property
    def has_come(self) -> bool:
        """Whether all of it has come, though some may be still to be read."""
        return self._decoder.finished

    def put_back(self, begun: bytes, model_span: tuple[int, int]) -> None:
        """Takes back what was read of it, to be read again, and where its model stands in that."""
        self.begun = self._ahead = begun
        self._model_span = model_span

    def ask_for(self, model: str) -> None:
        """Puts this model in the place of the one that stands in what was put back."""
        (start, end), name = self._model_span, model.encode("utf-8", "replace")
        if end:
            self._ahead = self.begun[:start] + name + self.begun[end:]
            if self._announced is not None:
                self.length = self._announced + len(name) - (end - start)

    async def read(self, has_responded: Optional[Callable[[], bool]] = None) -> bytes:
        """The next piece, b"" at the end; of many chunks some, when others had their turn. Raises ClientGone, TooLarge,
        MalformedRequest, and EarlyResponse when `has_responded` says that the provider speaks before there is one."""
        while True:
            if self._chunks and is_laborious(self._channel.received):
                await checkpoint(self._loop, self._loop.greedy)
            piece = self._next_piece()
            if piece or self.finished:
                return piece
            await self._wait_for_more(has_responded)

    async def read_all(self) -> bytes:
        """The rest of a short body. Raises what read() does."""
        pieces = [await self.read()]
        while not self.finished:
            pieces.append(await self.read())
        return b"".join(pieces)

    def must_come_within(self, seconds: float) -> None:
        """Sets the deadline of the whole body."""
        self._latest = self._loop.now + seconds

    async def discard(self) -> bool:
        """Drains an unread body, so that the connection can be kept; False if it is too long or not here within
        DISCARD_SECONDS."""
        if not self.finished and (self._sends_continue or self.length is None or self.length > DISCARDED_BODY_BYTES):
            return False
        self.must_come_within(DISCARD_SECONDS)
        try:
            while not self.finished:
                await self.read()
        except RelayError:
            return False
        return True

    def _next_piece(self) -> bytes:
        """What has come of the body and not been read yet, or a part of it. Raises TooLarge and MalformedRequest."""
        received, decoder = self._channel.received, self._decoder
        if self._ahead:
            piece, self._ahead = self._ahead, b""
            return piece
        if not received or decoder.finished:
            return b""
        size = decoded_at_once(received) if self._chunks else len(received)
        try:
            piece = decoder.feed(received[:size])
        except FramingError as error:
            raise MalformedRequest(f"the chunked body is malformed: {error}") from None
        self._channel.keep(decoder.rest + received[size:])
        if self._chunks:
            self._taken += len(piece)
            if self._taken + self._chunks.announced > self._limit:
                raise self._too_large()
        if self.watch:
            self.watch(piece)
        return piece

    async def _wait_for_more(self, has_responded: Optional[Callable[[], bool]]) -> None:
        """Waits for more of the body."""
        channel, deadline = self._channel, min(self._loop.now + BODY_PAUSE_SECONDS, self._latest)
        if self._sends_continue:
            self._sends_continue = False
            try:
                await channel.send(b"HTTP/1.1 100 Continue\r\n\r\n", STALLED_CLIENT_SECONDS)
            except (OSError, Overdue):
                raise ClientGone from None
        try:
            while not channel.received:
                if has_responded and has_responded():
                    raise EarlyResponse
                await until(deadline)
        except Overdue:
            raise MalformedRequest("the body takes too long", 408) from None
        self.waited()

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the body is over this relay's limit of {size_text(self._limit, self._setting)}")


def size_text(count: int, setting: str) -> str:
    """A limit as a person reads it, and the setting that it comes from."""
    return f"{count / MEGABYTE:g} MB (server.{setting})" if setting else f"{count} bytes"


# ==== Upstream ===================================================================================
#
# Connections to providers are made in the loop: an attempt costs no thread, and ends when its client leaves. Only names
# are looked up in threads, one for each name, however many wait for it; and the steps of TLS handshakes, in which a
# provider may ask for much arithmetic, are taken in one for each host. A kept connection is checked right before its
# next request: what it holds then is no response to that. Where the request doesn't reach the provider on it, another
# connection gets the request.
#
# An Attempt sends a request on a connection, and reads as much of the response as it takes to judge that. Echo is
# reached in the same way, by a pair of sockets. The UpstreamResponse knows where the relay's own key stands in it.


# OpenSSL's codes for a certificate whose authority this machine doesn't trust (x509_vfy.h): a container may have no
# authorities at all, and a company's proxy has one of its own.
UNKNOWN_AUTHORITY = (2, 18, 19, 20, 21)
IGNORE_UNEXPECTED_EOF = 0x80  # SSL_CTX_set_options(3); Python has no name for it before 3.10


class UpstreamPool:
    """Connects to providers, and keeps connections that can be used again."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._idle: dict[tuple[str, str, int, str], list[Channel]] = {}
        self._failed: dict[Any, float] = {}  # addresses that took no connection, and when
        self._tls: Optional[ssl.SSLContext] = None

    def prepare(self, providers: Iterable[Provider]) -> None:
        """Loads and opens what connecting to these needs: while the relay serves, there may be no descriptor for it."""
        codecs.lookup("idna")
        for provider in providers:
            if provider.scheme == "https":
                with contextlib.suppress(OSError):  # certificates that can't be read; each request will say so
                    self._tls_context()

    def take(self, provider: Provider) -> Optional[Channel]:
        """A kept connection, the one used last: it is the least likely to be closed soon. One that came back just now
        is left: what its provider sends behind its response, if anything, has yet to be seen."""
        idle = self._idle.get(pool_key(provider), [])
        for index in reversed(range(len(idle))):
            if idle[index].kept_in_turn != self._loop.turn:
                channel = idle.pop(index)
                if self._is_good(channel):
                    channel.task = self._loop.running
                    return channel
                channel.close()
        return None

    def keep(self, provider: Provider, channel: Channel) -> None:
        """Takes a connection back after a whole response."""
        idle = self._idle.setdefault(pool_key(provider), [])
        if channel.ended or len(idle) >= UPSTREAM_IDLE_CONNECTIONS:
            channel.abort_on_close(True)  # else its port, of which there are few, is taken for another minute
            channel.close()
            return
        channel.idle_since, channel.kept_at = self._loop.now, time.time()
        channel.kept_in_turn = self._loop.turn
        channel.task = None
        idle.append(channel)

    async def connect(self, provider: Provider) -> Channel:
        """A new connection. Raises Unreachable, ClientGone, and Unavailable when descriptors have run out."""
        while True:
            try:
                if provider.format == "echo":
                    return echo_channel(self._loop)
                return await self._dial(provider)
            except (OSError, ValueError, FramingError, Overdue) as error:
                if not lacks_descriptor(error):
                    raise Unreachable(connect_problem(error, provider)) from None
            # What is idle, also a client's connection, is worth less than a request.
            if not self._loop.make_room():
                raise Unavailable("this relay has no file descriptor left for a connection", "no_descriptors")

    def close(self) -> bool:
        """Closes all kept connections; whether there was one."""
        kept = [channel for channels in self._idle.values() for channel in channels if not channel.closed]
        for channel in kept:
            channel.close()
        self._idle.clear()
        return bool(kept)

    async def drop_stale(self) -> None:
        """Closes what is idle for too long, and what is idle and old: else one that is always in use would lead to the
        addresses of long ago. In steps: of thousands that were used at one moment, each takes 25 µs."""
        async for channel in in_steps(self._loop, [*itertools.chain.from_iterable(self._idle.values())]):
            is_old = channel.opened_at < self._loop.now - UPSTREAM_KEPT_SECONDS
            if not channel.task and (is_old or not self._is_good(channel)):  # one that has been taken is in use
                channel.close()
        self._idle = {place: [it for it in kept if not it.closed] for place, kept in self._idle.items()}

    def _is_good(self, channel: Channel) -> bool:
        """Whether it is open, and hasn't been idle for too long."""
        # While a laptop sleeps, the monotonic clock stands still, and connections die unnoticed (Go's net/http looks at
        # the time of day, too).
        idle = max(self._loop.now - channel.idle_since, time.time() - channel.kept_at)
        return not channel.closed and idle < UPSTREAM_IDLE_SECONDS

    async def _dial(self, provider: Provider) -> Channel:
        """A connection over the network, through a proxy where the environment names one, its TLS handshake made; all
        of it within `connect_timeout`."""
        proxy, deadline = proxy_for(provider), self._loop.now + provider.connect_timeout
        host, port = provider.host, provider.port
        if proxy:
            host, port = proxy.hostname or "", proxy.port or DEFAULT_PORTS["http"]
        addresses = await self._addresses(host, port, deadline)

        async def secure(channel: Channel) -> None:
            await channel.secure(self._tls_context(), provider.host, deadline)

        is_secure = provider.scheme == "https"
        prepare = secure if is_secure and not proxy else None
        channel = await connect_any(self._loop, addresses, deadline, self._failed, prepare)
        try:
            if proxy and is_secure:
                await open_tunnel(self._loop, channel, provider, proxy, deadline)
                await secure(channel)
            elif proxy:
                channel.target_prefix = provider.origin
                channel.extra_fields = proxy_credential(proxy)
        except BaseException:
            channel.close()
            raise
        return channel

    def _tls_context(self) -> ssl.SSLContext:
        """The TLS settings of all upstream connections. Raises OSError."""
        if self._tls is None:
            self._tls = ssl.create_default_context()
            self._tls.set_alpn_protocols(["http/1.1"])
            # Python's own, but for those with DHE: their groups are the server's choice, and may take 0.6 s.
            self._tls.set_ciphers("ECDH+AESGCM:ECDH+CHACHA20:ECDH+AES:!aNULL:!eNULL:!aDSS:!SHA1:!AESCCM")
            # Some Pythons set it, which makes an end without a close_notify look like one with it.
            self._tls.options &= ~IGNORE_UNEXPECTED_EOF
        return self._tls

    async def _addresses(self, host: str, port: int, deadline: float) -> list[Any]:
        """The addresses of a host, as getaddrinfo() returns them. Raises OSError, Overdue and ClientGone."""
        try:
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        except socket.gaierror:
            pass  # it is a name
        look_up = functools.partial(self._look_up, host, port)
        found: Union[list[Any], Exception, None] = None
        try:
            found = await self._loop.start_for_all((host, port), look_up).finished(deadline)
            if isinstance(found, Exception):
                raise found
            return found or []
        finally:
            found = None  # else its traceback and this frame would keep each other

    async def _look_up(self, host: str, port: int) -> Union[list[Any], Exception]:
        """The addresses of a name, looked up in a thread, or why there are none."""
        try:
            return await in_thread(self._loop, lambda: host_addresses(host, port), None)
        except (OSError, ValueError, Unavailable) as error:
            return error.with_traceback(None)  # which holds this task


def pool_key(provider: Provider) -> tuple[str, str, int, str]:
    """The key of a provider's connections in the pool; providers with the same one share them."""
    return provider.scheme, provider.host, provider.port, provider.proxy


def host_addresses(host: str, port: int) -> list[Any]:
    """The addresses of a host name. Raises OSError."""
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[:CONNECTED_ADDRESSES]
    except OSError:
        # A name looks unknown to one who can't open the files to look it up in, or glibc names an error of its own for
        # that (EBUSY). That there are few descriptors is told by the error that these raise; one alone may have come
        # free by now.
        with contextlib.ExitStack() as taken:
            for _ in range(LOOKUP_DESCRIPTORS):
                taken.enter_context(socket.socket())
        raise


Preparation = Optional[Callable[[Channel], Coroutine[float, None, None]]]


async def connect_any(
    loop: EventLoop, addresses: Sequence[Any], deadline: float, failed: dict[Any, float], prepare: Preparation
) -> Channel:
    """A connection to the first address that takes one, and where `prepare` succeeds. Each gets an equal share of the
    time left; of many, the first ones get ADDRESS_SECONDS each. Those that have `failed` of late come last, the latest
    at the end: where IPv6 leads nowhere, only the first connection waits for it, and another one only when IPv4 has
    failed, too. Raises OSError, Overdue and ClientGone."""
    problem: Exception = OSError(errno.EADDRNOTAVAIL, "its host has no address")
    oldest = loop.now - AVOIDED_SECONDS
    addresses = sorted(addresses, key=lambda found: max(oldest, failed.get(found[4], oldest)))
    for index, (family, _, _, _, address) in enumerate(addresses):
        left = deadline - loop.now
        latest = loop.now + left / min(len(addresses) - index, max(2, int(left / ADDRESS_SECONDS)))
        try:
            return await connect_one(loop, family, address, latest, prepare)
        except (OSError, Overdue) as error:
            # What TLS says of an address tells more than that another one, of IPv6 for example, leads nowhere.
            problem = problem if isinstance(problem, ssl.SSLError) else error
            if len(failed) >= AVOIDED_ADDRESSES:
                failed.clear()
            failed[address] = loop.now
        if loop.now >= deadline:
            break
    try:
        raise problem
    finally:
        del problem  # else its traceback and this frame would keep each other


async def connect_one(loop: EventLoop, family: int, address: Any, deadline: float, prepare: Preparation) -> Channel:
    """A connection to this address, prepared. Raises OSError, Overdue and ClientGone."""
    sock, channel = socket.socket(family, socket.SOCK_STREAM), None
    try:
        tune(sock)
        channel = Channel(sock, loop)
        await channel.connect(address, deadline)
        if prepare:
            await prepare(channel)
        return channel
    except BaseException:
        (channel or sock).close()
        raise


async def open_tunnel(loop: EventLoop, channel: Channel, provider: Provider, proxy: Any, deadline: float) -> None:
    """Opens a tunnel through an HTTP proxy to the provider (RFC 9110 §9.3.6). Raises OSError, FramingError, Overdue and
    ClientGone."""
    host = f"[{provider.host}]" if ":" in provider.host else provider.host
    place = f"{host}:{provider.port}"
    head = head_bytes(f"CONNECT {place} HTTP/1.1", [("Host", place), *proxy_credential(proxy)])
    await channel.send(head, deadline - loop.now)
    heads = ResponseHeads(loop, channel)
    response = heads.take_final()
    while not response:
        if not await channel.arrival(deadline):
            raise ConnectionError("the proxy closed the connection without an answer")
        response = heads.take_final()
    if response.status // 100 != 2:
        raise ConnectionError(f"the proxy answered with {response.status}")
    if channel.received:
        raise ConnectionError("the proxy sent more than its answer")


def connect_problem(error: Exception, provider: Provider) -> str:
    """Why a connection failed, in words for a client: which provider, and nothing of its address."""
    if isinstance(error, (Overdue, TimeoutError, socket.timeout)):  # socket.timeout: another class before Python 3.10
        reason = "connect timeout"
    elif isinstance(error, ssl.SSLCertVerificationError):
        said = error.verify_message.partition(", certificate is not valid for")[0]  # behind that stands its host
        reason = f"its certificate is not valid: {said}"
        if error.verify_code in UNKNOWN_AUTHORITY:
            reason += "; the relay's machine must trust its authority: install ca-certificates, or set SSL_CERT_FILE"
    elif isinstance(error, socket.gaierror):
        is_unanswered = error.errno == socket.EAI_AGAIN  # also without a network
        reason = "no name server tells where its host is" if is_unanswered else "its host name is unknown"
    elif isinstance(error, OSError):
        reason = (error.strerror or str(error) or type(error).__name__).lower()
    elif isinstance(error, FramingError):
        reason = f"malformed answer: {error}"
    else:
        reason = type(error).__name__
    return f"can't connect to {named_with_way(provider)}: {reason}"


def named_with_way(provider: Provider) -> str:
    """A provider in a message about a connection to it, which may be the fault of a proxy."""
    return f"the provider {provider.name}{' through the proxy' if proxy_address(provider) else ''}"


def proxy_for(provider: Provider) -> Any:
    """The proxy to use, as urlsplit takes it apart, or None. Raises OSError for what is none."""
    address = proxy_address(provider)
    try:
        proxy = urlsplit(address if "://" in address else f"http://{address}") if address else None
        if proxy and (proxy.scheme != "http" or not proxy.hostname or proxy.port == 0):
            raise OSError(errno.EPROTONOSUPPORT, f"a proxy by {proxy.scheme} can't be used, only one by http")
    except ValueError:
        raise OSError(errno.EINVAL, "its address is not a URL") from None
    return proxy


def proxy_address(provider: Provider) -> str:
    """Where the proxy to use is, or nothing: the provider's own setting, else HTTPS_PROXY, HTTP_PROXY and NO_PROXY."""
    if provider.proxy:
        return "" if provider.proxy == "direct" else provider.proxy
    bypassed = is_loopback(provider.host) or bypasses_proxy(provider.host, provider.port, proxy_variable("no"))
    return "" if bypassed else proxy_variable(provider.scheme)


def proxy_variable(name: str) -> str:
    """A variable such as HTTPS_PROXY; in lower case it goes first, also when it is empty, as in curl."""
    return os.environ.get(f"{name}_proxy", os.environ.get(f"{name.upper()}_PROXY", ""))


def bypasses_proxy(host: str, port: int, no_proxy: str) -> bool:
    """Whether NO_PROXY names the host: by its name, a suffix (`.corp`, `*.corp`), a CIDR block or `*`, perhaps with a
    port; as curl, Go and Node read it."""
    for entry in filter(None, map(str.strip, no_proxy.lower().split(","))):
        name, colon, its_port = entry.rpartition(":") if entry.count(":") == 1 else (entry, "", "")
        suffix = name.removeprefix("*").removeprefix(".")
        named = name == "*" or host == suffix or host.endswith(f".{suffix}") or is_within_network(host, name)
        if named and (not colon or its_port == str(port)):
            return True
    return False


def is_within_network(host: str, block: str) -> bool:
    """Whether the host is an address of the block."""
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(block.strip("[]"), strict=False)
    except ValueError:
        return False


def proxy_credential(proxy: Any) -> Pairs:
    """The header field for user and password in a proxy's URL."""
    if proxy.username is None:
        return []
    credential = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}".encode()
    return [("Proxy-Authorization", "Basic " + base64.b64encode(credential).decode("ascii"))]


def echo_channel(loop: EventLoop) -> Channel:
    """A connection to the echo provider: a task of its own serves the other end."""
    near, far = socket.socketpair()
    channel = Channel(near, loop)
    loop.start(serve_echo(loop, far))
    return channel


async def serve_echo(loop: EventLoop, sock: socket.socket) -> None:
    """Reads one request as HTTP, and answers it at the pace that its model's name asks for."""
    channel = Channel(sock, loop)
    loop.current.client = channel
    try:
        while not head_length(channel.received):
            await until()
        head = parse_request_head(channel.take(head_length(channel.received)))
        request_id = new_request_id()
        try:
            body = await RequestBody(channel, head, ECHO_BODY_BYTES, loop).read_all()
        except TooLarge:
            fault = EchoFault(413, f"echo reads at most {ECHO_BODY_BYTES} bytes")
            response = echo_error(head.path, fault, request_id)
        else:
            betas = elements_of(",".join(head.fields.all("anthropic-beta")))
            compose = functools.partial(echo_response, head.method, head.path, body, time.time(), request_id, betas)
            await checkpoint(loop)
            slow = len(body) > ECHO_AT_ONCE_BYTES
            response = (await in_thread(loop, compose, loop.worker)) if slow else compose()
            del body, compose
        await send_echo(loop, channel, response, request_id)
        await channel.finish_sending()
    except (OSError, ClientGone, Overdue, RelayError):
        pass  # the relay has closed its end: the client left, or is being answered already
    except RecursionError:
        pass  # what is to be echoed is nested deeper than what this thread can tell: the response is cut
    finally:
        channel.close()


async def send_echo(loop: EventLoop, channel: Channel, response: EchoResponse, request_id: str) -> None:
    """Sends the response as it is made; one that is cut lacks its end."""
    chunked = response.size is None
    framing = ("transfer-encoding", "chunked") if chunked else ("content-length", str(response.size))
    fields = [("content-type", response.content_type), framing, ("connection", "close")]
    if response.content_type.startswith("text/event-stream"):
        fields += [("cache-control", "no-cache"), ("x-accel-buffering", "no")]
    fields.append(("request-id", request_id))
    head = head_bytes(f"HTTP/1.1 {response.status} {reason_of(response.status)}", fields)
    await channel.send(head, STALLED_CLIENT_SECONDS)
    begun = loop.clock()
    for part in response.parts:
        if response.pause:
            await sleep(loop, response.pause)
        elif loop.clock() - begun > SLOW_EVENT_SECONDS:
            await checkpoint(loop)
            begun = loop.clock()
        data = chunk(part) if chunked else part
        del part  # it may be as long as the request, and the client may take its time
        await channel.send(data, STALLED_CLIENT_SECONDS)
    if chunked and not response.cut:
        await channel.send(LAST_CHUNK, STALLED_CLIENT_SECONDS)


BARE_LF = re.compile(rb"(?:^|[^\r])\n")


class ResponseHeads:
    """Finds the head of the final response in what has come from a provider, and passes over interim ones."""

    def __init__(self, loop: EventLoop, channel: Channel) -> None:
        self._loop = loop
        self._channel = channel
        self._from = 0  # where in what has come the end of a head may begin
        self._interim = 0
        self._since = loop.now

    def has_begun(self) -> bool:
        """Whether the final response has begun to arrive, or the provider has closed. Raises FramingError."""
        self._pass_interim()
        received = self._channel.received
        return self._channel.ended or (len(received) >= len(b"HTTP/1.1 2") and received[9:10] != b"1")

    def refuses(self) -> bool:
        """Whether the provider reads no more of the request: it has closed, or its response isn't a good one. Raises
        FramingError."""
        return self.has_begun() and (self._channel.ended or self._channel.received[9:10] != b"2")

    def take_final(self) -> Optional[ResponseHead]:
        """The head of the final response, once it is whole. Raises FramingError."""
        size = self._pass_interim()
        return parse_response_head(self._channel.take(size)) if size else None

    def _pass_interim(self) -> int:
        """Drops whole interim heads; the size of the final one, 0 while it isn't whole."""
        channel = self._channel
        while True:
            end = channel.received.find(b"\r\n\r\n", self._from)
            size = end + len(b"\r\n\r\n") if end >= 0 else len(channel.received) + 1  # or more
            if size > RESPONSE_HEAD_BYTES:
                raise FramingError(f"its head is longer than {RESPONSE_HEAD_BYTES} bytes")
            if end < 0:
                if BARE_LF.search(channel.received, self._from):
                    raise FramingError("a line of its head ends in LF alone")
                self._from = max(0, len(channel.received) - 3)
                return 0
            self._from = 0
            if channel.received[9:10] != b"1":
                return size
            self._count_interim(parse_response_head(channel.take(size)))

    def _count_interim(self, head: ResponseHead) -> None:
        if self._loop.now - self._since > INTERIM_SECONDS:
            self._interim, self._since = 0, self._loop.now
        self._interim += 1
        if self._interim > INTERIM_RESPONSES or head.status == 101:
            raise FramingError("it sends too many interim answers, or switches protocols unasked")


# What the manuals of local servers give for a key, such as lm-studio, not-needed and sk-no-key-required. A random key
# without any digit would be longer.
KEY_OF_WORDS = re.compile(rb"(?=.{1,31}\Z)[A-Za-z]+(?:[-_][A-Za-z]+)*")
KEY_BYTES = bytes(range(0x21, 0x7F))  # of which keys are made
# Of a header field or a parameter of a base_url's query: Azure's functions take a key in `code`.
SECRET_NAME = re.compile(r"(?i)code|(?:.*[-_])?(?:authorization|auth|(?:api[-_]?)?key|token|secret)")


def unescaped(text: str) -> str:
    """The text with the escapes of JSON, HTML and URLs replaced by their characters."""
    text = re.sub(r"\\u00([0-9a-fA-F]{2})", lambda match: chr(int(match[1], 16)), text.replace("\\/", "/"))
    # No character has a number so long, and Python converts none of thousands of digits.
    text = re.sub(r"&#[0-9]{8,}", "", re.sub(r"&#0+(?=[0-9])", "&#", text))
    return unquote(html.unescape(text))


class UpstreamResponse:
    """A response whose head has been read; its body may still be coming."""

    def __init__(self, candidate: Candidate, channel: Channel, head: ResponseHead, decoder: Decoder) -> None:
        self.candidate = candidate
        self.channel = channel
        self.head = head
        self.decoder = decoder
        self.content = b""  # of the body, decoded and not passed on yet
        self._inflated = (0, b"")  # of how much of a compressed one, and how it begins
        self._judged = -1, False  # how much of it was looked at for an error at its beginning, and whether as a stream
        self._error: tuple[bool, Optional[AnswerFault]] = (False, None)  # what came of that, see _judge()
        self.whole_request = True  # False when it came before the request had been sent
        self.has_body = True  # False for one that must not have any: a provider may send one nevertheless
        self.translated: Optional[Translated] = None  # the request, if it was that
        # In a compressed body no lines can be seen. An error that is called a stream is mostly JSON: its server would
        # have begun one.
        self.is_stream = media_type(head.fields) == "text/event-stream" and head.status < 300 and not self.coding
        # The key that is erased from its body. One made of words is looked for in errors only: a model that explains
        # how to call a local server says it, too.
        secret = candidate.secret
        self.erased = b"" if head.status < 300 and KEY_OF_WORDS.fullmatch(secret) else secret

    @property
    def coding(self) -> str:
        """How its body is compressed, as some gateways do whatever they are asked; empty if it isn't."""
        coding = self.head.fields.get("content-encoding", "").lower()
        # "none" keeps servers such as Next.js from compressing it.
        return "" if coding in ("identity", "none") else coding

    @property
    def reusable(self) -> bool:
        """Whether the connection can carry another request."""
        return (
            self.decoder.finished
            and self.has_body
            and not isinstance(self.decoder, CloseDecoder)
            and not self.decoder.rest
            and not self.channel.received
            and not self.channel.is_sending
            and self.whole_request
            and self.head.version >= 1
            and "close" not in self.head.fields.connection
        )

    def let_go_of_fields(self) -> None:
        """Lets go of a long head that has been passed on, but for what is asked for later: whether it closes."""
        if len(self.head.fields.pairs) > KEPT_FIELDS:
            closing = [("connection", "close")] if "close" in self.head.fields.connection else []
            self.head = self.head._replace(fields=Headers(closing))

    @property
    def ends_with_connection(self) -> bool:
        """Whether its body has ended with the connection, in good order."""
        return isinstance(self.decoder, CloseDecoder) and self.channel.ended and not self.channel.broken

    @property
    def request_id(self) -> str:
        """The provider's own id of the request, or nothing."""
        id = self.head.fields.get("request-id") or self.head.fields.get("x-request-id", "")
        return "" if self.shows_key(id) else id

    @property
    def reason(self) -> str:
        """The phrase for its status."""
        return reason_of(self.head.status) if self.shows_key(self.head.reason) else self.head.reason

    @property
    def is_unknown(self) -> bool:
        """Whether it says that what the request goes on with isn't here: it may be another key's."""
        return self.head.status in (400, 404) and KEPT_ELSEWHERE.search(self.beginning) is not None

    def shows_key(self, text: str) -> bool:
        """Whether the key that is erased from its body stands in a part of its head."""
        return self.erased != b"" and self.erased.decode("ascii") in text

    @property
    def begins_with_error(self) -> bool:
        """Whether it is a stream whose first event is an error, or a translated answer of 200 that is one."""
        return self._judge()[0]

    @property
    def first_fault(self) -> Optional[AnswerFault]:
        """The error with which a translated response of 200 begins, if it does."""
        return self._judge()[1]

    def _judge(self) -> tuple[bool, Optional[AnswerFault]]:
        """Whether it begins with an error, and which one if it is translated. The same beginning is read once: it is
        asked for several times, and 64 KB of it take 13 ms."""
        judged = len(self.content), self.is_stream
        if (self.is_stream or self.translated) and self._judged != judged:
            self._judged = judged
            if not self.translated:
                event = FIRST_EVENT_IS_ERROR.match(self.content)
                self._error = event is not None and is_error(event), None
            elif self.head.status < 300:
                fault = first_fault(self.content, self.is_stream)
                self._error = fault is not None, fault
        return self._error

    @property
    def status(self) -> int:
        """Its status; of an error that came with another one, the status that it should have had."""
        status = self.head.status
        if status < 300 and self.begins_with_error:
            fault = self.first_fault
            # Told in a stream that was opened too early: overloaded, unless it is the request's own fault.
            status = fault.status if fault else 400 if is_about_request(0, self.beginning) else 529
        return status if status < 300 else meant_status(status, self.beginning)

    @property
    def told(self) -> str:
        """The head, and what has come of the content."""
        fields = itertools.chain.from_iterable(self.head.fields.pairs)
        return "\n".join([self.readable.decode("latin-1"), self.head.reason, *fields])

    def quotes_key(self, text: str) -> bool:
        """Whether the key that was sent, or another secret in the provider's headers or its base_url's query, stands in
        a text, however it is escaped there."""
        key, provider = self.candidate.key, self.candidate.target.provider
        given = [(name, value.rpartition(" ")[2]) for name, value in provider.headers if value]
        in_query = (parameter.partition("=") for parameter in provider.query.split("&"))
        given += [(name, unquote(value)) for name, _, value in in_query]
        secrets = [secret for name, secret in given if len(secret) >= SECRET_CHARACTERS and SECRET_NAME.fullmatch(name)]
        own = key.secret.reveal() if key else ""
        # Local servers are given such words as ollama, none or EMPTY, or 1 or 123, which any error may hold.
        secrets += [own] if len(own) >= SECRET_CHARACTERS or (len(own) > 3 and not own.isalpha()) else []
        plain = unescaped(text[: 2 * PEEKED_BYTES]) if secrets else ""
        return any(secret in text or secret in plain for secret in secrets)

    @property
    def readable(self) -> bytes:
        """The beginning of what has come of the content, decompressed where the provider has compressed it unasked."""
        if self.coding not in ("gzip", "x-gzip", "deflate"):
            return self.content
        length, beginning = self._inflated
        if length != len(self.content):  # it is asked for several times, and may take 9 ms
            try:
                beginning = zlib.decompressobj(32 + zlib.MAX_WBITS).decompress(self.content, PEEKED_BYTES)
            except zlib.error:
                beginning = b""
            self._inflated = len(self.content), beginning
        return beginning

    def absorb(self, data: bytes) -> bytes:
        """Decodes the next bytes from upstream into `content`, and returns what they add. Raises FramingError."""
        decoded = self.decoder.feed(data)
        self.content = self.content + decoded if self.content else decoded
        return decoded

    @property
    def beginning(self) -> bytes:
        """The part of the content by which an error is judged, as far as it has come."""
        return self.readable[:PEEKED_BYTES]

    def take_content(self) -> bytes:
        """What has come of the content."""
        content, self.content = self.content, b""
        return content

    def release(self, pool: UpstreamPool) -> None:
        """Gives the connection back for reuse where that is possible, else closes it."""
        if self.channel.task is None:
            return  # it was given back before
        if self.reusable:
            pool.keep(self.candidate.target.provider, self.channel)
        else:
            self.channel.close()


DATA_LINE = re.compile(rb"(?:^|[\r\n])data: ?(\{[^\r\n]*)")


def is_error(event: re.Match[bytes]) -> bool:
    """Whether what looks like an error in a stream is one. In a chunk, Azure tells by an `error` within a choice that
    it has not filtered the text, and a tool of the client's may have a parameter of that name."""
    if not event[1]:
        return True
    line = DATA_LINE.search(event.string, event.start())
    try:
        return line is not None and failed_part(read_answer(line[1], READER)) is not None  # at once: it isn't long
    except AnswerFault:
        return False


# Headers by which a client names an account at OpenAI, Google or Anthropic, or brings a key of its own, which LiteLLM,
# Cloud Run, Bifrost and new-api (a WebSocket's, in any request) take rather than the relay's, or tells Portkey,
# Helicone or Cloudflare which of the kept ones to take; a 401 or 403 may be about these. What oauth2-proxy, in front of
# the relay, adds to each request is no such key.
ACCOUNT_HEADER = re.compile(
    r"openai-organization|openai-project|x-goog-user-project|anthropic-workspace-id|anthropic-user-profile-id"
    r"|sec-websocket-protocol|x-portkey-(?:config|provider|custom-host)|helicone-(?:target-url|openai-api-base)"
    r"|cf-aig-byok-alias"
    r"|(?!(?:x-)?idempotency-|x-forwarded-access-token)(?:.*[-_])?(?:authorization|auth|(?:api)?key|token|vk)"
)
# Parameters of a query by which providers take a key; Google's take `access_token`, Azure's functions `code`.
KEY_IN_QUERY = re.compile(r"(?i)(?:key|token|[?&]code)=")
Body = Union[ReadBody, RequestBody]


class UpstreamRequest(NamedTuple):
    """A request to be relayed."""

    head: RequestHead
    target: str  # path and query upstream, behind /v1
    by_model: bool  # whether it went where its model belongs, and creates nothing
    body: Body
    candidates: Sequence[Candidate]
    record: AccessRecord
    cools_down: bool = True  # whether its failures cool keys and providers down, and its success ends that
    searches: bool = False  # whether it asks for something that another key may know when one doesn't
    # Makes of it what a target of the other format gets, and None for one of its own; None where that can't be. It is
    # told whether this is the last target.
    translate: Optional[Callable[[Target, bool], Coroutine[float, None, Optional["UpstreamRequest"]]]] = None
    translated: Optional[Translated] = None  # what was made of it
    # Whether it only asks about a model. Other limits, and perhaps other rights, hold for that than for its work.
    is_aside: bool = False

    @property
    def only_once(self) -> bool:
        """Whether it must not be sent twice: what streams through is gone then, and what creates something (a batch,
        a file) would do so twice."""
        if isinstance(self.body, RequestBody):
            return self.head.method == "POST" or self.body.length != 0
        return self.head.method == "POST" and not self.by_model

    @property
    def names_account(self) -> bool:
        """Whether a provider's 401 or 403 may be about a header of the client, or a key in its query."""
        in_query = KEY_IN_QUERY.search(unquote(self.target)) is not None
        return in_query or any(map(ACCOUNT_HEADER.fullmatch, self.head.fields.keys() - GUARDED_HEADERS))


LINE_END = re.compile(rb"[\r\n]")
EVENT_DATA = re.compile(rb"(?:^(?:\xef\xbb\xbf)?|[\r\n])data:[^\r\n]*[\r\n]")
EVENT_END = re.compile(rb"\n\n|\r\r|\r\n\r\n")


class Attempt:
    """One try of a request with a candidate, and how far it has come."""

    def __init__(self, loop: EventLoop, request: UpstreamRequest, candidate: Candidate) -> None:
        self._loop = loop
        self._request = request
        self.candidate = candidate
        self.reached = False  # whether there was a connection
        self._may_be_lost = False  # whether it was a kept one, which may lead nowhere by now without a word of that
        self._sent = False  # whether all of the request was sent
        self.response: Optional[UpstreamResponse] = None
        self.problem = self.code = ""  # why there is none

    @property
    def has_begun(self) -> bool:
        """Whether any byte of a response has come, even of a malformed one."""
        return self.reached and (self.response is not None or self.channel.answered)

    @property
    def may_be_at_work(self) -> bool:
        """Whether the provider may have begun to work on the request."""
        return self.reached and self._sent and not self.channel.send_failed

    async def run(self, channel: Channel, kept: bool = False) -> None:
        """Sends the request on a connection, a new or a `kept` one, and reads the response until it can be judged: its
        head, of a stream the first line, too. Where the connection breaks, `problem` says how. Raises NoResponse,
        Unreachable, ClientGone, and what reading the body raises."""
        self.channel, self.reached, self._sent = channel, True, False
        # Where the provider's timeout is shorter, that decides.
        self._may_be_lost = kept and self.candidate.target.provider.timeout > UNTAKEN_SECONDS
        channel.answered = False
        self._heads = ResponseHeads(self._loop, channel)
        try:
            self._sent = await self._send()
            response = await self._read_head()
            response.whole_request = self._sent
            response.translated = self._request.translated
            if response.is_stream and response.translated:
                await self._read_first_event(response)
            elif response.is_stream:
                await self._read_first_line(response)
                if response.begins_with_error:
                    await peek(self._loop, response, EVENT_END)
            elif response.translated and response.head.status < 300:
                await self._read_beginning(response, response.translated.asked)
            elif response.head.status in TELLING_STATUSES:
                await peek(self._loop, response)
            self.response = response
        except FramingError as error:
            message = f"{named_with_way(self.candidate.target.provider)} sent a malformed answer: {error}"
            self.problem, self.code = message, "upstream_broken"
        except BrokenExchange as error:
            self.problem, self.code = str(error), "upstream_broken"
        finally:
            if not self.response:
                channel.close()

    async def _send(self) -> bool:
        """Sends the request; False when the provider answered, or broke off, before it had all of it. Raises
        NoResponse, ClientGone, and what reading the body raises."""
        request, candidate, channel = self._request, self.candidate, self.channel
        (provider, model), body = candidate.target, request.body
        length: Optional[int]
        if isinstance(body, ReadBody):
            pieces, recoded = body.with_model(model, decoded=provider.format == "echo")
            length = sum(map(len, pieces))
        else:
            if model:
                body.ask_for(model)
            pieces, recoded, length = [], False, body.length
        fields = upstream_fields(request.head, provider, candidate.key, length, recoded) + channel.extra_fields
        target = f"{channel.target_prefix}{provider.prefix}{request.target}"
        if provider.query:
            target += f"{'&' if '?' in target else '?'}{provider.query}"
        parts = [head_bytes(f"{request.head.method} {target} HTTP/1.1", fields), *pieces]
        patience = UNTAKEN_SECONDS if self._may_be_lost else provider.timeout
        try:
            if (length or 0) < RECEIVE_BYTES:  # it is cheaper to copy than to send in pieces
                await self._send_piece(b"".join(parts), patience)
            else:
                async for part in in_steps(self._loop, parts):  # for each, CPython's lock may have to be waited for
                    await self._send_piece(part, patience)
            if isinstance(body, RequestBody):
                await self._stream_body(body, provider.timeout)
        except Overdue:
            if self._may_be_lost and not request.body.is_spent:
                self._give_up()
            raise NoResponse(f"{named_with_way(provider)} took nothing for {provider.timeout:g} seconds") from None
        except (OSError, EarlyResponse):
            # It may have answered before it closed; reading will tell.
            return False
        return True

    async def _send_piece(self, data: bytes, timeout: float) -> None:
        """Sends all of a piece of the request, even when a good response has begun: that may go on only when the
        provider has read the piece. Raises EarlyResponse when no more of it is wanted, Overdue, OSError and
        ClientGone."""
        try:
            await self.channel.send(data, timeout, self._heads.has_begun)
        except EarlyResponse as early:
            if self._heads.refuses():
                raise
            try:
                await self.channel.send(early.args[0], UNWANTED_SECONDS)
            except Overdue:
                raise EarlyResponse from None

    async def _stream_body(self, body: RequestBody, timeout: float) -> None:
        """Sends a body piece by piece as it comes from the client. Raises EarlyResponse and what both sides raise."""
        chunked = body.length is None
        while not body.finished:
            piece = await body.read(self._heads.refuses)
            body.is_spent = True
            await self._send_piece(chunk(piece) if chunked else piece, timeout)
        if chunked:
            await self._send_piece(LAST_CHUNK, timeout)

    async def _read_head(self) -> UpstreamResponse:
        """Waits for the head of the final response. Raises BrokenExchange, NoResponse, Unreachable and FramingError."""
        channel, method = self.channel, self._request.head.method
        head = self._heads.take_final() if channel.received else None
        while not head:
            looked_at = self._loop.now + LOST_SECONDS if self._may_be_lost else math.inf
            try:
                await more_of(self._loop, channel, self.candidate, looked_at)
            except Overdue:
                self._look_at_kept()
            head = self._heads.take_final()
        if head.status == 407 and channel.target_prefix:
            raise self._refused_by_proxy()
        response = UpstreamResponse(self.candidate, channel, head, response_decoder(head, method))
        response.has_body = method != "HEAD" and head.status not in (204, 304)
        if channel.received:
            response.absorb(await take_in_turn(self._loop, channel))
        return response

    def _refused_by_proxy(self) -> Exception:
        """That the proxy refuses the relay's credential: nothing has reached the provider, so another target may be
        tried, unless the body is gone."""
        problem = connect_problem(ConnectionError("the proxy answered with 407"), self.candidate.target.provider)
        return BrokenExchange(problem) if self._request.body.is_spent else Unreachable(problem)

    def _look_at_kept(self) -> None:
        """Gives a kept connection up if nobody acknowledges what was sent on it; one that shows no sign of that isn't
        looked at again. Raises BrokenExchange."""
        is_lost = self.channel.is_lost()
        if is_lost:
            self._give_up()
        self._may_be_lost = is_lost is not None

    def _give_up(self) -> NoReturn:
        """Ends a kept connection on which the request doesn't reach the provider, so that it never will. Raises
        BrokenExchange."""
        self.channel.send_failed = True
        self.channel.abort_on_close(True)
        raise BrokenExchange(f"the provider {self.candidate.target.provider.name} isn't heard on a kept connection")

    async def _read_first_line(self, response: UpstreamResponse) -> None:
        """Waits for the first line of a stream, which tells whether it is an error. Raises BrokenExchange, NoResponse
        and FramingError."""
        news = response.content
        while (
            not LINE_END.search(news) and not response.decoder.finished and len(response.content) <= STREAM_LINE_BYTES
        ):
            try:
                news = await absorb_more(self._loop, response)
            except BrokenExchange:
                if isinstance(response.decoder, CloseDecoder) and STREAM_ENDS.search(response.content):
                    break  # the only line is the end of the stream, though it has none itself
                raise
        self._refuse_empty(response)

    def _refuse_empty(self, response: UpstreamResponse) -> None:
        """Raises BrokenExchange for a model's stream that is over without an event: gateways end it so, in good order,
        when what is behind them fails."""
        is_over = response.decoder.finished and response.has_body
        if is_over and self._request.by_model and not response.content.strip():
            raise BrokenExchange(f"{named_with_way(self.candidate.target.provider)} sent a stream without an event")

    async def _read_beginning(self, response: UpstreamResponse, asked: Asked) -> None:
        """Waits for so much of an answer that is translated as shows whether it is an error, or the stream that was
        asked for, whatever it is called. Raises BrokenExchange, NoResponse and FramingError."""
        if asked.stream and not response.content and not response.decoder.finished:
            await absorb_more(self._loop, response)
        await peek(self._loop, response, BEGINS_EVENT if asked.stream else None)
        response.is_stream = asked.stream and BEGINS_EVENT.match(response.content) is not None
        if response.is_stream:
            await self._read_first_event(response)

    async def _read_first_event(self, response: UpstreamResponse) -> None:
        """Waits for the first data of a stream that is translated, but not for long. Raises BrokenExchange and
        FramingError."""
        deadline, seen = self._loop.now + PEEK_SECONDS, 0
        while (
            not EVENT_DATA.search(response.content, seen)
            and not response.decoder.finished
            and len(response.content) <= STREAM_LINE_BYTES
        ):
            seen = max(0, response.content.rfind(b"\n"), response.content.rfind(b"\r"))  # whole lines
            try:
                await absorb_more(self._loop, response, deadline)
            except Overdue:
                return
            except BrokenExchange:
                line = response.content[seen:].strip()
                if isinstance(response.decoder, CloseDecoder) and line.startswith(b"data:") and not is_cut_off(line):
                    return  # the only data is whole, though its line has no end
                raise
        self._refuse_empty(response)


async def take_in_turn(loop: EventLoop, channel: Channel) -> bytes:
    """Takes what has arrived; where it takes long to read, some of it, when others had their turn."""
    received = channel.received
    if len(received) <= RECEIVE_BYTES and not is_laborious(received):
        return channel.take_all()
    await checkpoint(loop, loop.greedy)  # while a client took nothing, four times as much may have come
    return channel.take(min(decoded_at_once(channel.received), RECEIVE_BYTES))


async def absorb_more(loop: EventLoop, response: UpstreamResponse, deadline: float = math.inf) -> bytes:
    """Decodes what comes next of a response, and returns what it adds. Raises FramingError, and what more_of() does."""
    if not response.channel.received:
        await more_of(loop, response.channel, response.candidate, deadline)
    return response.absorb(await take_in_turn(loop, response.channel))


async def more_of(loop: EventLoop, channel: Channel, candidate: Candidate, deadline: float = math.inf) -> None:
    """Waits for more of a response. Raises BrokenExchange, NoResponse, and Overdue at a deadline before that."""
    provider = candidate.target.provider
    latest = loop.now + provider.timeout
    try:
        if await channel.arrival(min(latest, deadline)):
            return
    except Overdue:
        if deadline < latest:
            raise
        raise NoResponse(f"{named_with_way(provider)} sent nothing for {provider.timeout:g} seconds") from None
    raise BrokenExchange(f"{named_with_way(provider)} closed the connection without an answer")


async def peek(loop: EventLoop, response: UpstreamResponse, pattern: Optional[re.Pattern[bytes]] = None) -> None:
    """Reads as much of an error as it takes to judge it, or only until the pattern is found. What goes
    wrong meanwhile shows when the response is passed on. Raises ClientGone."""
    channel, deadline = response.channel, loop.now + PEEK_SECONDS
    try:
        while not response.decoder.finished and len(response.content) < PEEKED_BYTES:
            if pattern and pattern.search(response.content):
                break
            if channel.received:
                response.absorb(await take_in_turn(loop, channel))
            elif channel.ended:
                break
            else:
                await channel.arrival(deadline)
    except Overdue:
        pass
    except FramingError:
        channel.received, channel.ended, channel.broken = b"", True, True
        channel.close()
    if len(response.content) > ERROR_BYTES:
        await checkpoint(loop)  # to judge a long one takes some milliseconds


# ==== Relay ======================================================================================
#
# The attempt loop. A request may be tried again elsewhere as long as nothing of a response has gone to
# the client, and as long as no provider can be at work on it: after a response that refuses it, or a
# connection that failed. One whose connection broke after all of it was sent may have been begun, and is
# tried elsewhere once; one that met silence is not. A response that refuses the relay's own key, or quotes
# it, isn't for the client: an error of the relay's own takes its place.


ABOUT_ACCOUNT = re.compile(rb"(?i)organization|project|workspace|profile")


async def as_wanted(request: UpstreamRequest, target: Target, waiting: Sequence[Candidate]) -> UpstreamRequest:
    """The request as the target gets it, translated or not, before the candidates that wait. Raises BadRequest, and
    Unavailable when there is no room for it."""
    if not request.translate:
        return request
    is_last = all(other.target == target for other in waiting)
    return await request.translate(target, is_last) or request


class Relay:
    """Gets responses from upstream. Outlives a reload."""

    def __init__(self, loop: EventLoop, warn: Callable[[str], None]) -> None:
        self.connections = UpstreamPool(loop)
        self.keys = KeyPool(random.Random(), warn)
        self._loop = loop

    async def obtain(self, request: UpstreamRequest) -> UpstreamResponse:
        """The response to deliver: the first that isn't a failure, else the last one there was. Raises UpstreamFailed,
        UpstreamSilent, Unavailable, BadRequest for what can't be translated, ClientGone, and what reading raises."""
        last: Optional[UpstreamResponse] = None
        broken: Optional[Attempt] = None  # the last try that brought none
        refusal: Optional[BadRequest] = None  # what the first target said that the request can't be translated to
        last_try = False
        waiting = list(request.candidates)
        missed: set[str] = set()  # names of the providers that took no connection
        try:
            while waiting:
                candidate = waiting.pop(0)
                try:
                    wanted = await as_wanted(request, candidate.target, waiting)
                except BadRequest as error:
                    refusal, error.__traceback__ = refusal or error, None  # which would keep this frame, and be kept
                    continue
                record_attempt(request.record, candidate)
                attempt = await self._attempt(wanted, candidate, fresh=request.only_once or last_try)
                response = attempt.response
                if response:
                    last = self._more_telling(last, response, request.searches) if last else response
                    if not self._is_failure(wanted, response) or last_try or request.body.is_spent:
                        break
                else:
                    broken = attempt
                    self._note_break(request, attempt, waiting, missed)
                    if attempt.reached and (last_try or request.only_once):
                        break
                    # A look-up may be sent to all: it begins no work that would be done twice.
                    last_try = last_try or (attempt.may_be_at_work and not request.searches)
        except BaseException:
            if last:
                last.release(self.connections)
            raise
        if last and not (broken and yields_to_break(request, last)):
            return await self._presented(request, last)
        if last:
            last.release(self.connections)
        raise no_response(request.record, broken, refusal)

    def finish(self, response: UpstreamResponse, failed: bool, complete: bool = False) -> None:
        """Releases a response. One that `failed` midway cools down the key for the model, so that the client's next try
        goes elsewhere. `complete`: all was told, though the end of its body may be still to come."""
        if response.head.status < 400:  # else it was noted when its head had come
            self.keys.note(response.candidate, "broken" if failed else "ok", time.time())
        if failed and response.candidate.target.provider.format != "echo":
            self.keys.failed(response.candidate, 502, None, self._loop.now)
        if complete and not response.decoder.finished:
            self._loop.start(self._read_end(response))
        else:
            response.release(self.connections)

    async def _read_end(self, response: UpstreamResponse) -> None:
        """Reads a body to its end, if that comes soon, so that its connection can be kept."""
        channel, deadline, size = response.channel, self._loop.now + BODY_END_SECONDS, 0
        channel.task = self._loop.current
        try:
            while not response.decoder.finished and not channel.ended and size <= BODY_END_BYTES:
                if not channel.received:
                    await channel.arrival(deadline)
                rest = await take_in_turn(self._loop, channel)
                response.decoder.feed(rest)
                size += len(rest)
        except (Overdue, FramingError):
            pass  # a connection of which more is to come isn't kept
        finally:
            response.release(self.connections)

    def _more_telling(self, before: UpstreamResponse, response: UpstreamResponse, searches: bool) -> UpstreamResponse:
        """The one of two responses that the client gets if no better one comes. Releases the other. A refused key tells
        less than any other failure. That nothing was found, where one `searches` or goes on with what another key has,
        tells less than that a provider can't answer now: it may have it."""
        first, status = before.status, response.status
        is_unknown = ((searches and status == 404) or response.is_unknown) and first in RETRIED_STATUSES
        if (status in LASTING_STATUSES or is_unknown) and first not in LASTING_STATUSES:
            before, response = response, before
        before.release(self.connections)
        return response

    async def _attempt(self, request: UpstreamRequest, candidate: Candidate, fresh: bool) -> Attempt:
        """One try with a candidate. A kept connection that turns out to be closed is replaced, one that breaks when the
        provider may have worked for long isn't. `fresh`: no kept one is used, since only one try is left."""
        attempt, provider = Attempt(self._loop, request, candidate), candidate.target.provider
        try:
            kept, begun = None if fresh else self.connections.take(provider), self._loop.now
            if kept:
                await attempt.run(kept, kept=True)
            if not attempt.has_begun and not (attempt.may_be_at_work and self._loop.now - begun > STALE_SECONDS):
                await attempt.run(await self._connect(candidate))
        except Unreachable as error:
            attempt.problem, attempt.code, attempt.reached = str(error), "upstream_unreachable", False
        except NoResponse as error:
            self.keys.note(candidate, "silent", time.time())
            self.keys.failed(candidate, 504, None, self._loop.now)
            raise UpstreamSilent(str(error)) from None
        return attempt

    async def _connect(self, candidate: Candidate) -> Channel:
        """A new connection. Raises Unreachable, ClientGone and Unavailable."""
        self.keys.connecting(candidate, self._loop.now)
        try:
            return await self.connections.connect(candidate.target.provider)
        finally:
            self.keys.end_try(candidate, self._loop.now)

    def _note_break(
        self, request: UpstreamRequest, attempt: Attempt, waiting: list[Candidate], missed: set[str]
    ) -> None:
        """Cools down a provider that could not be reached, or the key with the model where the connection broke; not
        one that gave up on a slow upload. Echo never cools. The other keys for a provider that took no connection are
        tried behind those of others, and no more when that happens again: each may have the client wait as long."""
        candidate, met = attempt.candidate, attempt.code.partition("_")[2]
        provider = candidate.target.provider
        record_failure(request.record, candidate, met)
        self.keys.note(candidate, met, time.time())
        if not attempt.reached:
            waiting.sort(key=lambda other: other.target.provider is provider)
            if provider.name in missed:
                del waiting[sum(other.target.provider is not provider for other in waiting) :]
            missed.add(provider.name)
        if provider.format == "echo" or not request.cools_down:
            return
        if not attempt.reached:
            self.keys.unreachable(candidate, self._loop.now)
        elif request.body.finished:
            self.keys.failed(candidate, 502, None, self._loop.now)

    def _is_failure(self, request: UpstreamRequest, response: UpstreamResponse) -> bool:
        """Whether another candidate should be tried. Tells the key pool and the log how this one fared."""
        candidate = response.candidate
        provider, status = candidate.target.provider, response.status
        clock, cools_down = time.time(), request.cools_down and not request.is_aside and provider.format != "echo"
        self.keys.note_limits(candidate, response.head.fields, clock)
        if status < 300 and cools_down:
            self.keys.succeeded(candidate, self._loop.now)
        elif status >= 400:
            self.keys.note(candidate, "5xx" if status >= 500 else str(status), clock)
            # What the client itself has caused says nothing about a key: what it asked for, also where the key may be
            # used for other paths only, an account that it named, an upload that it didn't finish.
            own_fault = (
                (status in (401, 403) and request.names_account)
                or (status >= 500 and not request.body.finished)
                or is_about_request(status, response.beginning)
                or (status in (401, 403) and LACKS_SCOPE.search(response.beginning))
                or is_about_fast_mode(status, response.head.fields)
            )
            if cools_down and not own_fault and not (provider.client_keys and status < 500):
                wait = retry_after_seconds(response.head.fields.get("retry-after", ""), clock)
                self.keys.failed(candidate, status, wait, self._loop.now, request.by_model)
        may_be_elsewhere = status >= 400 and ((request.searches and status == 404) or response.is_unknown)
        if status not in RETRIED_STATUSES and not may_be_elsewhere:
            return False
        record_failure(request.record, candidate, str(status))
        return True

    async def _presented(self, request: UpstreamRequest, response: UpstreamResponse) -> UpstreamResponse:
        """The response, unless it is about the relay's own key, shows it, or would lead the client away with its token.
        Raises UpstreamFailed for these."""
        if response.head.status < 300 and not response.begins_with_error:
            return response
        record_attempt(request.record, response.candidate, 0)  # which may be one before the last
        try:
            if response.head.status >= 300:
                await peek(self._loop, response)
            problem, code = await self._problem(request, response)
            if problem and response.candidate.target.provider.format != "echo":
                raise UpstreamFailed(problem, code, lasts=True)
        except BaseException:
            response.release(self.connections)
            raise
        return response

    async def _problem(self, request: UpstreamRequest, response: UpstreamResponse) -> tuple[str, str]:
        """What problem_of() says, of a long error in a thread: one full of escapes takes time. Raises Unavailable."""
        judge = functools.partial(problem_of, request, response)
        if len(response.told) <= ERROR_BYTES:
            return judge()
        return await in_thread(self._loop, judge, self._loop.worker)


def record_attempt(record: AccessRecord, candidate: Candidate, attempts: int = 1) -> None:
    """Records which candidate the request is with."""
    record.attempts += attempts
    record.provider = candidate.target.provider.name
    record.sent_model, record.key = candidate.target.model or record.model, candidate.label
    # By these names Azure's model-router and OpenRouter choose who answers; a list has no more than a fee for that.
    chooses = "router" in record.sent_model or record.sent_model == "auto" or record.sent_model.startswith("~")
    record.usage.seeks_model = record.usage.seeks_model or chooses


def yields_to_break(request: UpstreamRequest, response: UpstreamResponse) -> bool:
    """Whether the client is told of a try without a response instead of being sent this one, since a later try may
    succeed there. True of a refused key, whatever was asked, and of a look-up that found nothing."""
    is_refusal = response.status in LASTING_STATUSES and not is_about_request(response.status, response.beginning)
    return is_refusal or (request.searches and response.status == 404)


def no_response(record: AccessRecord, broken: Optional[Attempt], refusal: Optional[BadRequest]) -> RelayError:
    """The error in place of a response: how the last try without one broke, else why none was made."""
    if not broken:
        return refusal or UpstreamFailed("there is no provider to try", "upstream_unreachable")
    record_attempt(record, broken.candidate, 0)  # which may be one before the last
    return UpstreamFailed(broken.problem, broken.code)


def record_failure(record: AccessRecord, candidate: Candidate, met: str) -> None:
    """Records an attempt that failed, and what it met."""
    name = f"{candidate.target.provider.name}/{candidate.label}".rstrip("/")
    record.tried = f"{record.tried} {name}:{met}".strip()


def problem_of(request: UpstreamRequest, response: UpstreamResponse) -> tuple[str, str]:
    """Why a response that tells of an error isn't for the client, and a short code for that; empty if it is."""
    status, name = response.status, f"the provider {response.candidate.target.provider.name}"
    if 300 <= status < 400 and status != 304 and "location" in response.head.fields:
        return f"{name} answered with a redirect ({status}): correct its base_url in relay.json", "upstream_redirect"
    is_about_account = request.names_account and ABOUT_ACCOUNT.search(response.beginning)
    is_clients = not response.translated and bool(is_about_account or is_about_request(status, response.beginning))
    code = error_member(response.readable, "code") or error_member(response.readable, "type")
    return key_problem(response, status, response.told, code, is_clients)


def key_problem(
    response: UpstreamResponse, status: int, told: str, code: str = "", is_clients: bool = False
) -> tuple[str, str]:
    """Why an error with that status isn't for the client, and a short code for that; empty if it is. One that isn't
    refuses the relay's key, and not something of the client's (`is_clients`), or quotes the key."""
    candidate, has_quoted = response.candidate, response.quotes_key(told)
    name = f"the provider {candidate.target.provider.name}"
    if status == 401 and not (is_clients or candidate.target.provider.client_keys):
        key = f"key {candidate.label}" if candidate.key else "lack of a key"
        reason = "401" if has_quoted else f"401 {code}".strip()
        return f"{name} refused this relay's {key} ({reason})", "upstream_refused_key"
    if has_quoted:
        return f"{name} answered with {status}, and quoted this relay's key in that", "upstream_quoted_key"
    return "", ""


def presented_fault(response: UpstreamResponse, fault: AnswerFault) -> AnswerFault:
    """A fault in the midst of a response, or another one in its place if it isn't for the client."""
    problem, code = key_problem(response, fault.status, f"{fault.message}\n{fault.text}")
    return AnswerFault(problem, code=code) if problem else fault


def upstream_error(content: bytes) -> str:
    """A provider's error as the log has it: `upstream:` and its type, if it has one."""
    return f"upstream:{error_member(content, 'type')}".rstrip(":")


def streamed_error(events: bytes) -> str:
    """A provider's error in the events of a stream, as the log has it."""
    types = (error_member(data[1], "type") for data in DATA_LINE.finditer(events))
    return f"upstream:{next(filter(None, types), 'error')}"


def error_member(content: bytes, name: str) -> str:
    """A short name in a provider's error; empty if there is none, or where it would take long to find."""
    if len(content) > ERROR_BYTES:
        return ""
    try:
        found = json.loads(content)["error"].get(name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
    return found if isinstance(found, str) and re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", found) else ""


# ==== Catalogue =====================================================================================
#
# One list of models for all providers, since clients ask for one. It may be some minutes old, and a provider that is
# slow or down leaves its place empty: whoever asks waits two seconds at most.


PATTERN = re.compile(r"[*?]")  # in a name: it stands for several


class Catalogue:
    """The models that this relay offers: aliases, echo's, and what each usable provider lists."""

    def __init__(self, relay: Relay, loop: EventLoop) -> None:
        self._relay = relay
        self._loop = loop
        self._lists: dict[Provider, tuple[float, list[JsonDict]]] = {}  # fresh until when, and what
        self._warned: set[str] = set()  # the providers whose lists can't be read
        self._named: tuple[Optional[Config], list[JsonDict]] = (None, [])  # what a relay.json names, for all who ask

    async def entries(self, config: Config) -> list[JsonDict]:
        """One entry a name: a bare one if relay.json or echo has it, else as the first provider that lists it does."""
        usable = [provider for provider in config.providers.values() if provider.usable]
        asked = [provider for provider in usable if provider.format != "echo" and not provider.client_keys]
        listed = await self._listed(asked)
        if self._named[0] is not config:
            self._named = config, named_entries(config, usable)
        entries = [*self._named[1], *itertools.chain.from_iterable(listed)]
        return list({entry["id"]: entry for entry in reversed(entries)}.values())[::-1]

    async def _listed(self, providers: Sequence[Provider]) -> list[list[JsonDict]]:
        """What each provider lists: remembered, or asked for now, all at once and not for long."""
        now = self._loop.now
        nothing: tuple[float, list[JsonDict]] = (-math.inf, [])
        stale = [provider for provider in providers if self._lists.get(provider, nothing)[0] < now]
        fetches = [self._loop.start_for_all(it, functools.partial(self._fetch, it)) for it in stale]
        with contextlib.suppress(Overdue):
            for fetch in fetches:
                await fetch.finished(now + CATALOGUE_WAIT_SECONDS)
        for provider in stale:
            # One that is still silent isn't waited for again at once; a late list is taken all the same.
            fresh_until, entries = self._lists.get(provider, nothing)
            self._lists[provider] = max(fresh_until, now + CATALOGUE_RETRY_SECONDS), entries
        return [self._lists[provider][1] for provider in providers if provider in self._lists]

    async def _fetch(self, provider: Provider) -> None:
        """Asks a provider for its list, and remembers it; one that fails lists nothing for CATALOGUE_RETRY_SECONDS."""
        patience = min(provider.timeout, CATALOGUE_RETRY_SECONDS)  # what comes late is for who asks next
        patient = provider._replace(timeout=patience, connect_timeout=CATALOGUE_WAIT_SECONDS)
        target = "/models?limit=1000" if provider.format == "anthropic" else "/models"
        # Cloudflare, and other firewalls of providers, answer 403 to whom has no name.
        head = RequestHead("GET", "/v1/models", "", 1, Headers([("User-Agent", f"MonoRelay/{__version__}")]), 0)
        candidates = [Candidate(Target(patient, ""), key) for key in provider.keys or (None,)]
        record = AccessRecord(time.time(), self._loop.now)
        request = UpstreamRequest(head, target, False, ReadBody(), candidates, record, cools_down=False)
        entries: list[JsonDict] = []
        asked_at, fresh_seconds = self._loop.now, CATALOGUE_FRESH_SECONDS
        try:
            response = await self._relay.obtain(request)
            try:
                parts = json_parts([await read_rest(self._loop, response)])  # which take long where all is escaped
                text = "".join([part async for part in in_steps(self._loop, parts)])
                listed = await in_thread(self._loop, lambda: list(listed_entries(text)), self._loop.worker)
            finally:
                response.release(self._relay.connections)
            for entry in listed:
                if entry and provider.serves(entry["id"]):
                    entries.append(entry)
                await checkpoint(self._loop)
        except (RelayError, UpstreamFailure, FramingError, ValueError, RecursionError):
            entries, fresh_seconds = [], CATALOGUE_RETRY_SECONDS
            if provider.name not in self._warned:
                self._warned.add(provider.name)
                self._loop.warn(f"the provider {provider.name} gives no list of models that can be read")
        latest = asked_at + CATALOGUE_FRESH_SECONDS  # what was asked for later, by another relay.json, stays
        self._lists = {
            other: listed for other, listed in self._lists.items() if other.name != provider.name or listed[0] > latest
        }
        self._lists[provider] = asked_at + fresh_seconds, entries


def named_entries(config: Config, usable: Sequence[Provider]) -> list[JsonDict]:
    """An entry for each name that a relay.json has for one model, and for echo's."""
    echoes = ECHO_MODELS if any(provider.format == "echo" for provider in usable) else ()
    names = itertools.chain(config.aliases, config.routes, *(provider.models for provider in usable), echoes)
    return [{"id": name} for name in names if not PATTERN.search(name)]


async def read_rest(loop: EventLoop, response: UpstreamResponse) -> bytes:
    """The whole body of a list of models, without the relay's key. Raises BrokenExchange, NoResponse and FramingError,
    also for one that is too long, or that would take `json` long."""
    body = bytearray(response.take_content())
    while not response.decoder.finished:
        try:
            body += await absorb_more(loop, response)
        except BrokenExchange:
            if response.ends_with_connection:
                break
            raise
        response.take_content()
        if len(body) > CATALOGUE_BYTES:
            raise FramingError("the list of models is too long")
    # An object takes four times as much as another value.
    if body.count(b"[") + body.count(b",") + 4 * body.count(b"{") > CATALOGUE_VALUES:
        raise FramingError("the list of models has too many values")
    return bytes(body).replace(response.erased, b"*" * len(response.erased))


def listed_entries(text: str) -> Iterator[JsonDict]:
    """The first LISTED_MODELS entries of a JSON list in narrow text, bare or the `data` of an object: of a long entry
    only its id, and {} for one that names no model. Raises ValueError for what is no such list."""
    document = json.loads(text, parse_int=short_integer, parse_float=read_fraction, parse_constant=refuse_constant)
    del text
    listed = document.get("data") if isinstance(document, dict) else document
    if not isinstance(listed, list):
        raise ValueError("there is no list in it")
    for entry in listed[:LISTED_MODELS]:
        named = isinstance(entry, dict) and is_text(entry.get("id")) and characters(entry["id"]) <= MODEL_CHARACTERS
        told = entry if named and is_small(entry) else {"id": entry["id"]} if named else {}
        yield json.loads(json.dumps(told, ensure_ascii=False).encode("latin-1"))


def read_fraction(digits: str) -> float:
    """The number. Other threads have turns between two calls of this, as between none of float() itself: a list of
    models may have 40,000 numbers that take 3 µs each."""
    return float(digits)


def is_small(entry: JsonDict) -> bool:
    """Whether an entry has at most LISTED_ENTRY_VALUES values, and so many characters in its strings. One with a number
    that Python can't hold (1e400), and so can't write again, isn't small."""
    waiting: list[Any] = [entry]
    values = length = 0
    while waiting and values + len(waiting) <= LISTED_ENTRY_VALUES and length <= LISTED_ENTRY_CHARACTERS:
        value = waiting.pop()
        values += 1
        if isinstance(value, dict):
            length += sum(map(len, value))
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str):
            length += len(value)
        elif isinstance(value, float) and math.isinf(value):
            return False
    return not waiting and length <= LISTED_ENTRY_CHARACTERS


def model_entry(entry: JsonDict, format: str) -> JsonDict:
    """An entry of the catalogue in the shape of a format; what the provider said of it stays."""
    name = entry["id"]
    if format == "anthropic":
        usual: JsonDict = {"type": "model", "id": name, "display_name": name, "created_at": ECHO_CREATED}
    else:
        usual = {"id": name, "object": "model", "created": ECHO_CREATED_UNIX, "owned_by": "monorelay"}
    native = ("type" in entry) if format == "anthropic" else ("object" in entry)
    return {**usual, **entry} if native else {key: entry.get(key, value) for key, value in usual.items()}


def model_page(entries: Sequence[JsonDict], query: str, format: str) -> JsonDict:
    """The page of the list that a query asks for with limit, after_id and before_id; its entries are to be put into the
    shape of the format when they are written. Raises BadRequest."""
    asked = dict(parse_qsl(query))
    names = [entry["id"] for entry in entries]
    limit = asked.get("limit", "20" if format == "anthropic" else "100000")
    if not re.fullmatch(r"[0-9]{1,6}", limit) or int(limit) < 1:
        raise BadRequest("limit: Input should be a whole number from 1")
    for key in ("after_id", "before_id"):
        if key in asked and asked[key] not in names:
            raise BadRequest(f"{key}: there is no model {asked[key]!r}")
    start = names.index(asked["after_id"]) + 1 if "after_id" in asked else 0
    end = names.index(asked["before_id"]) if "before_id" in asked else len(names)
    backwards = "before_id" in asked and "after_id" not in asked
    page = entries[max(start, end - int(limit)) : end] if backwards else entries[start : min(end, start + int(limit))]
    shown = {
        "data": page,
        "has_more": len(page) < end - start,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
    }
    return shown if format == "anthropic" else {"object": "list", **shown}


# ==== Responses ==================================================================================
#
# What a client is sent goes out in one place, Handler._send, whether all of it is there or a provider is still sending
# it. A Response says what; an Outgoing makes bytes of it, and decides, in one place, whether the body has a
# length, is chunked or ends with the connection, what HEAD, 204 and HTTP/1.0 leave out, and whether the connection is
# kept. It holds back nothing but the beginning of a line, so that an error can be told between two lines, and for a
# moment what may be a part of a key. Behind its begin(), next_part() waits for what goes out next.

# What keeps nginx and its like, in front of the relay, from holding a stream back.
UNBUFFERED = (("x-accel-buffering", "no"), ("cache-control", "no-cache"))


class UrlRewriter:
    """Rewrites the URLs of a batch's results, and of videos, from the provider to the relay in a JSON body, as it
    streams: clients follow them with the relay's token, which must not leave. The body is otherwise left as it is."""

    _HELD_BYTES = 4096  # longer than any beginning of a match that could be cut in two
    # The first is Anthropic's of batches, the next two are OpenRouter's of videos, the last is new-api's.
    _NAME = re.compile(rb'"(?:results_url|polling_url|unsigned_urls|url)"')
    _NAME_BYTES = len('"unsigned_urls"')
    _URL = re.compile(rb'"(?:[^"\\]|\\.){0,2048}"')
    _MEMBER = re.compile(  # with one, or a list of them
        rb"(%b\s{0,16}:\s{0,16})(%b|\[\s{0,16}%b(?:\s{0,16},\s{0,16}%b){0,63}\s{0,16}\])"
        % (_NAME.pattern, *[_URL.pattern] * 3)
    )

    def __init__(self, provider: Provider, relay_url: str) -> None:
        self._provider = provider
        self._relay_url = relay_url
        self._held = b""
        self._seen = 0  # URLs of what has come at once

    def feed(self, data: bytes) -> bytes:
        """What can be passed on of the body up to here."""
        self._seen = 0
        data = self._MEMBER.sub(self._rewritten, self._held + data)
        cut = max(0, len(data) - self._NAME_BYTES)
        for name in self._NAME.finditer(data, max(0, len(data) - self._HELD_BYTES)):
            cut = name.start()
        self._held = data[cut:]
        return data[:cut]

    def flush(self) -> bytes:
        """The rest, at the end of the body."""
        held, self._held = self._held, b""
        return self._MEMBER.sub(self._rewritten, held)

    def _rewritten(self, member: re.Match[bytes]) -> bytes:
        """The member with its URL, or those in its list, rewritten."""
        return member[1] + self._URL.sub(self._followed, member[2])

    def _followed(self, spelled: re.Match[bytes]) -> bytes:
        """A URL that leads to the relay, if this one leads to the provider, however it is spelled; of too many,
        none."""
        self._seen += 1
        if self._seen > URLS_AT_ONCE:
            return b"null"
        try:
            url = urlsplit(json.loads(spelled[0]).strip())
            place = url.hostname, url.port or DEFAULT_PORTS.get(url.scheme)
        except ValueError:
            return spelled[0]
        provider = self._provider
        is_relative = not url.netloc and url.path.startswith(f"{provider.prefix}/")
        if not is_relative and place != (provider.host, provider.port):
            return spelled[0]
        start, path = "" if is_relative else self._relay_url, url.path.removeprefix(provider.prefix)
        return json.dumps(f"{start}/v1{path}?{url.query}".rstrip("?")).encode("ascii")


class KeyEraser:
    """Erases the relay's key from a body as it streams. What may be a part of a key waits for what follows, whether it
    fits this one or not: else a client could learn the key from the pieces of what it has stored at the provider."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._held = b""
        self._released = 0  # bytes of it, which went out since nothing followed
        self.holds_back = False  # whether something waits for what follows

    def feed(self, data: bytes, is_last: bool) -> bytes:
        """What can be passed on of the body up to here; in all it is as long as it came."""
        data = (self._held + data).replace(self._key, b"*" * len(self._key))
        if not self._held and data[-1:] not in KEY_BYTES:
            return data  # such as lines
        end, released = len(data), self._released
        if not is_last:
            latest = data[max(0, end + 1 - len(self._key)) :]
            end -= len(latest) - len(latest.rstrip(KEY_BYTES))
        self._held, self._released = data[end:], max(0, released - end)
        self.holds_back = len(self._held) > self._released
        return data[released:end]

    def release(self) -> bytes:
        """What was held back. If it was the beginning of the key, the rest of that will be erased."""
        data, self._released = self._held[self._released :], len(self._held)
        self.holds_back = False
        return data


class Response(NamedTuple):
    """A response to a client: with a body of the relay's own, or a provider's, which may still be coming."""

    status: int
    reason: str
    fields: Pairs  # but for those of the framing
    body: bytes = b""
    relayed: Optional[UpstreamResponse] = None
    rewriter: Optional[UrlRewriter] = None  # of its body
    translator: Optional[AnswerTranslator] = None  # of an event stream in the other format
    close: bool = False  # whether the connection can't be used for another request
    live: Optional["LivePage"] = None  # whose events are sent instead of a body


def own_response(status: int, body: bytes, fields: Pairs, request_id: str, close: bool = False) -> Response:
    """A response that the relay itself makes."""
    needs_type = body and not any(name == "content-type" for name, _ in fields)
    content_type = [("content-type", "application/json")] if needs_type else []
    date = email.utils.formatdate(usegmt=True)
    ids = [(name, request_id) for name in ("request-id", "x-request-id", "x-monorelay-request-id")]
    return Response(status, reason_of(status), [("date", date), *content_type, *ids, *fields], body, close=close)


class TranslatedStream:
    """An event stream on its way into the other format. It is translated in parts, so that others have their turn."""

    def __init__(self, translator: AnswerTranslator) -> None:
        self.translator = translator
        self._untranslated = b""  # what has come, and waits until others had their turn
        self._at_once = TRANSLATED_FIRST_BYTES  # so much of that is translated next
        self._source_ended = False  # whether nothing more will come
        self._is_cut = False  # whether that is so since the provider broke off
        self.heard_at = 0.0  # when the provider last sent something
        self._told_end_at = 0.0  # when it told why the stream ends, though it hasn't ended

    @property
    def is_behind(self) -> bool:
        """Whether something waits to be translated, once others had their turn: go_on() does a part of it."""
        return bool(self._untranslated) and not self.translator.ended

    def ping_time(self, sent_at: float) -> float:
        """When to ping, if something last went out at `sent_at`: the client waits for a sign of life, or for an end of
        which the provider has told."""
        if not self.translator.may_end:
            return sent_at + PING_SECONDS
        self._told_end_at = self._told_end_at or self.heard_at
        return self._told_end_at + ENDING_SECONDS

    def feed(self, content: bytes, is_last: bool, is_cut: bool = False) -> bytes:
        """The events for what has come, or for a part of it. `is_last`: nothing more will come; `is_cut`: since the
        provider broke off."""
        self._untranslated += content
        self._source_ended, self._is_cut = is_last, is_cut
        return self.go_on()

    def go_on(self) -> bytes:
        """The events for the next part of what waits to be translated, and at its end."""
        waiting, size = self._untranslated, self._at_once
        part, self._untranslated = waiting[:size], waiting[size:]
        events = self.translator.feed(part)
        if self._untranslated:
            # Each event for the client may be far longer than the provider's; all wait for one that takes nothing.
            growth = max(1, len(events) / len(part))
            self._at_once = max(TRANSLATED_FIRST_BYTES, int(TRANSLATED_AT_ONCE_BYTES / growth))
        if self._source_ended and not self._untranslated and not self.translator.ended:
            events += self.translator.close(self._is_cut)
        return events


class Outgoing:
    """A response as bytes for its client: first begin(), then feed() with what comes from the provider, until it has
    `ended`. Does no I/O."""

    def __init__(self, response: Response, request: Optional[RequestHead], format: str, record: AccessRecord) -> None:
        self.ended = False
        self.keep_alive = False
        self.failed = False  # whether the provider broke off its response, or told of an error in the midst of a stream
        self.must_reset = False  # whether only a reset shows the client that the body isn't whole
        self._response = response
        self._request = request  # None for one that can't be read
        self._format = format
        self._record = record
        self._chunked = self.until_close = False
        relayed = response.relayed
        self._decoder = relayed.decoder if relayed else LengthDecoder(0)
        self._eraser = KeyEraser(relayed.erased) if relayed else None
        self._is_stream = relayed is not None and relayed.is_stream
        self.translation = TranslatedStream(response.translator) if response.translator else None
        self._lines = LineSplitter() if self._is_stream and not response.translator else None
        self._filter = self._lines or response.rewriter
        # Whether a stream has to say that it is over, since its framing doesn't, and whether it has.
        self._awaits_end = self._lines is not None and isinstance(self._decoder, CloseDecoder)
        self._sees_end = False
        self._name = b""  # of an event whose data hasn't come yet: its line
        self._last = b""  # the end of what has been framed, though some of it may be held back
        self.held_up = 0.0  # seconds for which its client has let it wait

    def begin(self, keep_alive: bool, now: float) -> bytes:
        """The head, and what there is of the body, of a translated stream at least a ping. `keep_alive`: the connection
        may be kept."""
        response, request, record = self._response, self._request, self._record
        self._request = None  # its head may be long, and nobody asks for it any more
        status, fields, relayed = response.status, [*response.fields], response.relayed
        version = request.version if request else 1
        bodyless = status in (204, 304) or (request is not None and request.method == "HEAD")
        length = relayed.head.fields.get("content-length", "") if relayed else str(len(response.body))
        if relayed and self._is_stream:
            fields += [pair for pair in UNBUFFERED if pair[0] not in relayed.head.fields]
        if length and status != 204 and not (self._filter or self._is_stream or response.live):  # RFC 9110 §8.6
            fields.append(("content-length", length))
        elif not bodyless and version >= 1:
            self._chunked = True
            fields.append(("transfer-encoding", "chunked"))
        elif not bodyless:
            self.until_close = True  # HTTP/1.0 knows the end of such a body by the end of the connection
        self.keep_alive = keep_alive and not self.until_close
        if not self.keep_alive:
            fields.append(("connection", "close"))
        elif version == 0:
            fields.append(("connection", "keep-alive"))
        record.status, record.first_byte, record.is_stream = status, now, self._is_stream
        head = head_bytes(f"HTTP/1.1 {status} {response.reason}", fields)
        if self.translation:
            self.translation.heard_at = now
        if relayed:
            response.fields.clear()
            relayed.let_go_of_fields()
            begun = head + self._passed(relayed.take_content())
            if self.translation and not record.bytes_sent:
                begun += self.translated(self.translation.translator.ping())
            return begun
        self.ended = record.complete = bodyless
        is_long = len(response.body) > COPIED_BYTES  # it goes out behind the head
        return head if bodyless or response.live or is_long else head + self.rest()

    def rest(self) -> bytes:
        """The body of a response of the relay's own, behind its head."""
        self.ended = self._record.complete = True
        return self._framed(self._response.body)

    def tell(self, data: bytes) -> bytes:
        """What goes out for the next event of the live page; no data is its end."""
        self.ended = self._record.complete = not data
        return self._framed(data)

    def feed(self, data: bytes, closed: bool, broken: bool) -> bytes:
        """What goes out for the next bytes from the provider. `closed`: these are the last, it has closed the
        connection; `broken`: not by a FIN, over TLS by a close_notify."""
        try:
            sent = self._passed(self._decoder.feed(data)) if data else b""
        except FramingError:
            return self.fail("the provider broke the framing of its answer", "upstream_broken")
        return sent + self._close(broken) if closed and not self.ended else sent

    def fail(self, message: str, code: str) -> bytes:
        """What goes out for a body that can't be completed: for a stream a last event that says so, and in any case
        not its proper end, so that nobody takes it for whole."""
        record = self._record
        record.error = code
        self.failed = code.startswith("upstream_") and not self._may_be_clients_fault
        self.keep_alive = record.complete = False
        self.ended = True
        self.must_reset = self.until_close
        event = self._error_event("timeout_error" if code == "upstream_timeout" else "api_error", message, code)
        return self.release() + (chunk(event) if event and self._chunked else event)

    @property
    def _may_be_clients_fault(self) -> bool:
        """Whether a provider that breaks off may have lost patience with the client, which took nothing, or didn't send
        the rest of a request that is answered before it is whole."""
        relayed = self._response.relayed
        return self.held_up > HELD_UP_SECONDS or (relayed is not None and not relayed.whole_request)

    @property
    def _is_whole_refusal(self) -> bool:
        """Whether this is an error that can be seen to be whole, and explains why its connection was reset: the server
        closed it without having read the request, a part of which is unsent."""
        relayed = self._response.relayed
        is_refusal = relayed is not None and relayed.head.status >= 400 and not relayed.whole_request
        return is_refusal and self._last.rstrip()[-1:] in (b"}", b">")

    def _error_event(self, kind: str, message: str, code: str) -> bytes:
        """The event by which a stream tells of an error; nothing for any other body."""
        if self.translation:
            return self.translation.translator.fail(message, kind, code)
        if not self._lines:
            return b""
        # Behind a CR, an LF would go on with the end of its line.
        line_end = b"\n\n" if self._lines.mid_line or self._last.endswith(b"\r") else b"\n"
        if ENDS_IN_NAME.search(self._last):
            line_end = b""  # the error's name takes its place: SDKs fail to read an event that has a name and no data
        return line_end + error_event(self._format, kind, message, code, self._record.request_id)

    def _close(self, broken: bool) -> bytes:
        """What goes out when the provider has closed: the end of the body where only that marks it, unless the
        connection is broken or a stream hasn't said that it is over; else an error."""
        if self.translation:
            is_cut = broken if isinstance(self._decoder, CloseDecoder) else not self._decoder.finished
            return self.translated(self.translation.feed(b"", True, is_cut))
        if self._lines and self._lines.held and not is_cut_off(self._lines.held):
            self._look_for_end(self._lines.held + b"\n")  # a name that has no end has no data, either
        is_cut = self._awaits_end or (broken and not self._is_whole_refusal)
        if isinstance(self._decoder, CloseDecoder) and (self._sees_end or not is_cut):
            self._decoder.finished = True
            return self._passed(b"")
        return self.fail("the provider broke off its answer", "upstream_broken")

    def _passed(self, content: bytes) -> bytes:
        """The content as it goes out, whole lines of it in a stream."""
        if content:
            self._record.usage.read(content, self._is_stream)
        if self.translation:
            return self.translated(self.translation.feed(content, self._decoder.finished))
        if self._filter:
            content = self._filter.feed(content)
            if self._decoder.finished:
                rest = self._filter.flush()
                if self._lines and self._ends_within_line(content + rest, rest):
                    # What a proxy ends in good order when the server behind it has died.
                    whole = self._framed(content)
                    return whole + self.fail("the provider's stream ends within a line", "upstream_broken")
                content += rest
        self.ended = self._record.complete = self._decoder.finished
        return self._framed(content)

    def translated(self, events: bytes) -> bytes:
        """Translated events as they go out."""
        assert self.translation
        self.ended, fault = self.translation.translator.ended, self.translation.translator.fault
        if fault:
            self.failed = not (fault.is_about_request or (self._may_be_clients_fault and not fault.text))
            self._record.error = "upstream:error" if fault.text else fault.code
            self.keep_alive, self.must_reset = False, self.until_close
        else:
            self._record.complete = self.ended
        return self._framed(events)

    def _look_for_error(self, content: bytes) -> None:
        """Notes whether a stream tells of an error; what stands before that in the same bytes says nothing of it."""
        events = [*EVENT_IS_ERROR.finditer(content)]
        # Of those of which only their data can tell, the last ones are read: that of thousands would take long.
        told = [event for event in events if not event[1]][:1]
        told += [event for event in events if event[1]][-ERRORS_AT_ONCE:]
        event = min(filter(is_error, told), key=lambda found: found.start(), default=None)
        if event:
            data = content[event.start() : event.start() + ERROR_BYTES]
            self.failed = not is_about_request(0, data)
            self._record.error = streamed_error(data)

    def _look_for_end(self, content: bytes) -> None:
        """Notes whether a stream says that it is over; an event's name counts only when its data has come, too."""
        text = self._name + content
        name = ENDS_IN_NAME.search(text, max(0, len(text) - EVENT_NAME_BYTES))
        self._name = text[name.start() :] if name else b""
        # Of what is long, most is a picture, for which the expression takes 50 times as long as these words.
        may_end = len(text) < STREAM_LINE_BYTES or any(word in text for word in END_WORDS)
        if may_end and STREAM_ENDS.search(text, 0, name.start() if name else len(text)):
            self._sees_end = True

    def _ends_within_line(self, content: bytes, rest: bytes) -> bool:
        """Whether a stream that ends in good order does so within a line of data: `rest` is its last line, or what
        wasn't sent yet of one that is long."""
        if self._lines and self._lines.mid_line:
            return (content.rstrip() or self._last)[-1:] not in (b"}", b"]")
        return is_cut_off(rest)

    @property
    def holds_back(self) -> bool:
        """Whether something has come that may be a part of a key, and waits for what follows."""
        return self._eraser is not None and self._eraser.holds_back

    def release(self) -> bytes:
        """What was held back, as it goes out: nothing follows soon."""
        return self._sized(self._eraser.release()) if self._eraser else b""

    def _framed(self, content: bytes) -> bytes:
        """The content, framed, after a look at what it tells; with the end of the body where all of it went out."""
        if content:
            self._last = (self._last + content if len(content) < EVENT_NAME_BYTES else content)[-EVENT_NAME_BYTES:]
            if self._awaits_end:
                self._look_for_end(content)
        if self._eraser:
            content = self._eraser.feed(content, is_last=self._decoder.finished)
        if self._lines and b"error" in content:
            self._look_for_error(content)
        framed = self._sized(content)
        return framed + LAST_CHUNK if self._chunked and self._record.complete else framed

    def _sized(self, content: bytes) -> bytes:
        """The content as a part of the body, which is counted."""
        self._record.bytes_sent += len(content)
        return chunk(content) if self._chunked else content


async def next_part(loop: EventLoop, outgoing: Outgoing, response: Response) -> bytes:
    """What goes out next: what the relay itself goes on telling, what has come from the provider, or what tells the
    client why no more will."""
    relayed = response.relayed
    if response.live:
        return outgoing.tell(await response.live.next())
    if not relayed:
        return outgoing.rest()
    upstream, timeout = relayed.channel, relayed.candidate.target.provider.timeout
    holds_back = outgoing.holds_back
    try:
        if outgoing.translation:
            return await next_translated(loop, outgoing, outgoing.translation, upstream, timeout)
        if not upstream.received and not upstream.ended:
            await upstream.arrival(loop.now + (HELD_BACK_SECONDS if holds_back else timeout))
        return await fed(loop, outgoing, upstream)
    except Overdue:
        if holds_back:
            return outgoing.release()
        return outgoing.fail(f"the provider sent nothing for {timeout:g} seconds", "upstream_timeout")
    except Unavailable as error:  # the relay shuts down
        return outgoing.fail(error.message, error.code)


async def fed(loop: EventLoop, outgoing: Outgoing, upstream: Channel) -> bytes:
    """What goes out for what has come from the provider, or for some of it where that takes long."""
    data = await take_in_turn(loop, upstream)
    return outgoing.feed(data, upstream.ended and not upstream.received, upstream.broken)


async def next_translated(
    loop: EventLoop, outgoing: Outgoing, stream: TranslatedStream, upstream: Channel, timeout: float
) -> bytes:
    """What goes out next of a translated stream, within PING_SECONDS. Raises Overdue when the provider has been
    silent for its timeout."""
    sent_at, sent = loop.now, b""
    while not sent and not outgoing.ended:
        if stream.is_behind:
            await checkpoint(loop)
            sent = outgoing.translated(stream.go_on())
            continue
        pinged_at, silent_at = stream.ping_time(sent_at), stream.heard_at + timeout
        try:
            if not upstream.received and not upstream.ended:
                await upstream.arrival(min(pinged_at, silent_at))
        except Overdue:
            if silent_at <= pinged_at:
                raise
            return outgoing.translated(stream.translator.ping())
        stream.heard_at = loop.now
        sent = await fed(loop, outgoing, upstream)  # first: the usage may have come while the client took nothing
        if not (sent or outgoing.ended) and loop.now > pinged_at:
            return outgoing.translated(stream.translator.ping())
    return sent


# ==== Service ====================================================================================
#
# What all requests of a process share: the configuration in force, the loop, the relay, the ledger, and what is
# counted. Of several workers, each shows the others on a board (see Processes) what they need; Workers reads and writes
# it. What was used before is found by History, in the ledger or in memory. Also here: logins, and free memory.


class Service:
    """What all requests share. `routing`, the configuration with its targets, is replaced as a whole by a reload."""

    def __init__(
        self, config: Config, log: LogWriter, place: Optional["PlaceOnBoard"], clock: Callable[[], float]
    ) -> None:
        self.log = log
        self.draining = False
        self.loop = EventLoop(log.warn, clock)
        self.relay = Relay(self.loop, log.warn)
        self.catalogue = Catalogue(self.relay, self.loop)
        self.bodies = HeldBodies()
        self.requests = place.throttle() if place else Throttle()
        self.logins = LoginGate(self.loop)
        self.ledger = LedgerWriter(log.warn, clock)
        self._tally = Tally(time.time())
        self._uncounted: list[LedgerRow] = []  # of requests that have ended: many at once are counted faster
        self.running: dict[Exchange, None] = {}  # requests whose responses aren't all sent
        self.connections: Collection[object] = ()  # of clients
        self.pages: dict[LivePage, None] = {}  # that follow what happens
        self.workers = Workers(self, place)
        self.history = History(self)
        self.use(config)
        self.return_memory = find_malloc_trim()
        self._trimmed_at = self._collected_at = self.loop.now
        self.loop.post(lambda: self.loop.start(repeat(self.loop, self._tidy, SWEEP_SECONDS)))

    def use(self, config: Config) -> None:
        """Serves by this configuration from the next request on. The targets of models are worked out once for each."""
        for pattern in patterns_of(config):  # here, and not in the loop: thousands of new ones take 0.2 s
            shell_pattern(pattern)
        self.relay.connections.prepare(config.providers.values())
        self.bodies.limit = int(config.server.max_held_mb * MEGABYTE)
        # What waits to be counted is left to the loop, which may be counting: a reload comes in another thread.
        self._tally.users, self._tally.models = config.users, named_models(config)
        self.ledger.use(config)
        targets = functools.lru_cache(maxsize=1024)(functools.partial(targets_for, config))
        self.routing: tuple[Config, Callable[[str, str, bool], list[Target]]] = (config, targets)

    @property
    def config(self) -> Config:
        """The configuration in force."""
        return self.routing[0]

    @property
    def tally(self) -> Tally:
        """What was counted of all requests that have ended."""
        self._count()
        return self._tally

    def _count(self) -> None:
        rows, self._uncounted = self._uncounted, []
        self._tally.add(*rows)

    def budgets(self, owners: Iterable[User]) -> list[JsonDict]:
        """The budgets of these users: what was spent of each, and when it begins anew."""
        self.workers.look()
        (day, month), now = windows(time.time()), self.loop.now
        day_end, month_end = window_end(day), window_end(month)
        budgets: list[JsonDict] = []
        for owner in owners:
            limits: list[tuple[str, float, float, Optional[float]]] = []
            if owner.has_budget:
                usd, tokens = self.ledger.spent(owner.name, day)
                spent_in_month, _ = self.ledger.spent(owner.name, month)
                limits += [
                    ("usd_per_day", usd / 10**9, owner.usd_per_day, day_end),
                    ("usd_per_month", spent_in_month / 10**9, owner.usd_per_month, month_end),
                    ("tokens_per_day", tokens, owner.tokens_per_day, day_end),
                ]
            if owner.requests_per_minute:
                most = owner.requests_per_minute
                limits.append(("requests_per_minute", most - self.requests.left(owner.name, most, now), most, None))
            budgets += [
                {"user": owner.name, "limit": limit, "used": used, "of": most, "reset": reset}
                for limit, used, most, reset in limits
                if most
            ]
        return budgets

    def conclude(self, exchange: "Exchange") -> None:
        """Tells of a request that has ended: in the log, and, where it was one to a model, in the ledger and the
        figures."""
        self.running.pop(exchange, None)
        record, used = exchange.record, exchange.record.usage.used
        if exchange.may_tell_usage and any(used[: len(KINDS)]):
            exchange.uses_model = True
        if exchange.uses_model:
            record.used = used
            provider = exchange.config.providers.get(record.provider)
            if provider:
                for model in {record.sent_model, *filter(None, (record.usage.model, record.other_model))}:
                    cost = cost_of(exchange.config.prices, provider, model, used)
                    if cost is None and used.iterations:  # whose models may have no price by the names told there
                        cost = cost_of(exchange.config.prices, provider, model, used._replace(iterations=()))
                    record.cost = dearer(record.cost, cost)
            row = record.row(self.loop.now, time.time())
            self._uncounted.append(row)
            if len(self._uncounted) >= COUNTED_ROWS:
                self._count()
            self.ledger.put(row)
        # Neither a provider's error nor the end of a client that left, or was made to, is one of the relay's own.
        if record.error and not record.error.startswith(("upstream:", "client_gone", "made_room")):
            self._tally.refused[record.error] += 1
        self.log.record(record, self.loop.clock())
        record.usage = NOTHING_READ  # which holds the response's end, and the record is kept until the next request

    def _tidy(self) -> None:
        """Closes what is idle for too long, and gives free memory back to the system: soon when large bodies have left
        it, else now and then."""
        self.loop.start(self.relay.connections.drop_stale())
        self.relay.keys.forget(self.loop.now)
        # What is translated in a thread may be 240,000 lists, to look at which takes 0.1 s.
        at_work = self.loop.worker.is_busy or self.loop.long_worker.is_busy or self.loop.late_worker.is_busy
        is_quiet = len(self.connections) <= COLLECTED_CONNECTIONS and not at_work
        if self.loop.now - self._collected_at > (TRIM_SECONDS if is_quiet else COLLECTED_SECONDS):
            self._collected_at = self.loop.now
            collect()
        much = self.bodies.released > max(TRIMMED_BYTES, self.bodies.bytes)
        if much or self.loop.now - self._trimmed_at > TRIM_SECONDS:
            self.bodies.released, self._trimmed_at = 0, self.loop.now
            self.return_memory(0)


class Workers:
    """What the workers of a relay know together: each shows on a board what the others need. One that is alone has no
    board, and knows it all."""

    def __init__(self, service: Service, place: Optional["PlaceOnBoard"]) -> None:
        self._service = service
        self._place = place
        self._is_showing = False  # whether it is about to show which keys cool, and what the ledger's file lacks
        self._shown: Optional[JsonDict] = None  # the figures that it has shown last
        self._shown_at = self._looked_at = -math.inf
        self._seen: dict[int, int] = {}  # how often each of the others has shown that
        self._known: dict[str, tuple[Config, float, Any]] = {}  # what was found of late, behind configuration and time
        self._others: list[JsonDict] = []  # what the others, and those that have ended, have counted,
        self._read_at = -math.inf  # when that was read,
        self._summed: Optional[Tally] = None  # what all have, where there are others,
        self._summed_at = -math.inf  # and when that was summed up
        # The budgets of all: of which configuration, and when they were looked up.
        self._budgets: tuple[Optional[Config], float, list[JsonDict]] = (None, -math.inf, [])
        if place:
            service.relay.keys.changed = self.show_soon
            service.ledger.changed = lambda: service.loop.post(self.show_soon)
            show = functools.partial(self._show_figures, place)
            service.loop.post(lambda: service.loop.start(repeat(service.loop, show, SHARED_SECONDS)))

    def show_soon(self) -> None:
        """Shows the other workers, soon, which keys cool, and what was spent that isn't in the ledger's file."""
        if self._place and not self._is_showing:
            self._is_showing = True
            self._service.loop.start(self._show(self._place))

    async def _show(self, place: "PlaceOnBoard") -> None:
        loop, service = self._service.loop, self._service
        await sleep(loop, self._shown_at + SHARED_SOON_SECONDS - loop.now)
        self._shown_at, self._is_showing = loop.now, False
        place.show({"cooling": service.relay.keys.shared(loop.now), "spent": service.ledger.shared()})

    def _show_figures(self, place: "PlaceOnBoard") -> None:
        """Shows what this worker has counted and what runs, if that isn't what it has shown last."""
        self._service.ledger.note_delay()
        figures = self._figures()
        if figures != self._shown:
            place.show_figures(figures)
            self._shown = figures

    def _figures(self) -> JsonDict:
        service = self._service
        records = service.relay.keys.records.items()
        running = (exchange for exchange in service.running if exchange.uses_model or exchange.is_read_for_model)
        return {
            "tally": service.tally.shared(),
            "running": [running_row(exchange) for exchange in itertools.islice(running, RUNNING_ROWS)],
            "keys": [[*name, record_document(record)] for name, record in records],
            "gauges": self._gauges(),
        }

    def _gauges(self) -> dict[str, float]:
        service = self._service
        return {
            "monorelay_requests_running": sum(exchange.uses_model for exchange in service.running),
            "monorelay_connections_open": len(service.connections),
            "monorelay_log_lines_dropped_total": service.log.dropped_in_all,
            "monorelay_ledger_rows_dropped_total": service.ledger.dropped,
            "monorelay_ledger_rows_waiting": service.ledger.waiting,
        }

    def look(self) -> None:
        """Takes over what others have shown of keys and budgets."""
        now = self._service.loop.now
        if not self._place or now < self._looked_at + LOOKED_SECONDS:
            return
        self._looked_at = now
        for place, document in self._place.news(self._seen).items():
            self._service.relay.keys.adopt(document.get("cooling", ()))
            spent = {tuple(key): tuple(sums) for key, sums in document.get("spent", ())}
            self._service.ledger.elsewhere[place] = spent

    async def gather(self) -> None:
        """Takes over what the others have counted, for who asks below. Each of them may take 20 ms: it is done step by
        step, once for all who ask meanwhile."""
        if self._place and self._service.loop.now >= self._summed_at + SUMMED_SECONDS:
            await self._service.loop.start_for_all("sums", functools.partial(self._gather, self._place)).finished()

    async def _gather(self, place: "PlaceOnBoard") -> None:
        loop = self._service.loop
        if loop.now >= self._read_at + SHARED_SECONDS:
            others = []
            for figures in place.other_figures():
                others.append(figures)
                await checkpoint(loop)
            self._others, self._read_at = others, loop.now
        own = self._service.tally
        tally = Tally(own.since)
        for shared in (own.shared(), *(figures["tally"] for figures in self._others)):
            tally.include(shared)
            await checkpoint(loop)
        self._summed, self._summed_at = tally if self._others else None, loop.now

    def _lately(self, name: str, config: Config, find: Callable[[], Result]) -> Result:
        """What find() has found by the configuration of late, else what it finds now: many pages ask for the same."""
        now = self._service.loop.now
        known, found_at, found = self._known.get(name, (None, -math.inf, None))
        if known is not config or now >= found_at + SUMMED_SECONDS:
            found = find()
            self._known[name] = config, now, found
        return found  # type: ignore[return-value]

    def tally(self) -> Tally:
        """What all workers have counted."""
        return self._summed or self._service.tally

    def running(self) -> list[list[Any]]:
        """The running requests of all workers, oldest first."""
        return self._lately("running", self._service.config, self._find_running)

    def _find_running(self) -> list[list[Any]]:
        own = [running_row(exchange) for exchange in self._service.running]
        rows = itertools.chain(own, *(figures["running"] for figures in self._others))
        return sorted((row for row in rows if row[RUNNING_USER]), key=lambda row: float(row[RUNNING_SINCE]))

    def keys(self, config: Config) -> list[JsonDict]:
        """The state of each key, from all workers."""
        self.look()
        pool, now = self._service.relay.keys, self._service.loop.now
        own = [[*name, record_document(record)] for name, record in pool.records.items()]
        records = records_by_key([own, *(figures["keys"] for figures in self._others)])
        return key_states(config.providers.values(), pool, records, now, time.time())

    def keys_of_late(self, config: Config) -> list[JsonDict]:
        """The same, or as it was of late: it may take 20 ms, and all pages of the owner show the same."""
        return self._lately("keys", config, lambda: self.keys(config))

    async def budgets(self, config: Config) -> list[JsonDict]:
        """Those of all users, looked up in steps, once for all who ask meanwhile: of 2,000, with eight workers, it
        takes 80 ms."""
        for _ in range(2):  # what is being looked up may be those of the configuration before
            listed, listed_at, _ = self._budgets
            if listed is config and self._service.loop.now < listed_at + SUMMED_SECONDS:
                break
            list_budgets = functools.partial(self._list_budgets, config)
            await self._service.loop.start_for_all("budgets", list_budgets).finished()
        return self._budgets[2]

    async def _list_budgets(self, config: Config) -> None:
        owners, budgets = [*config.users.values()], []
        for at in range(0, len(owners), BUDGETS_AT_ONCE):
            budgets += self._service.budgets(owners[at : at + BUDGETS_AT_ONCE])
            await checkpoint(self._service.loop)
        self._budgets = config, self._service.loop.now, budgets

    def gauges(self) -> dict[str, float]:
        """The gauges of all workers, summed up."""
        sums = collections.Counter(self._gauges())
        for figures in self._others:
            sums.update(figures["gauges"])
        return dict(sums)

    async def metrics(self) -> bytes:
        """All that is counted, for Prometheus; who asks while that is being written gets the same text."""
        return bytes(await self._service.loop.start_for_all("metrics", self._write_metrics).finished())

    async def _write_metrics(self) -> bytes:
        await self.gather()
        tally, gauges = self.tally(), self.gauges()
        gauges["process_start_time_seconds"] = tally.since
        pieces = []
        for piece in metrics_text(tally, self.keys(self._service.config), gauges):
            pieces.append(piece.encode("utf-8"))
            await checkpoint(self._service.loop)
        return b"".join(pieces)


def running_row(exchange: "Exchange") -> list[Any]:
    """A request that runs, as the page gets it; without a user as long as nothing is known of it. `since` is in seconds
    since 1970."""
    record = exchange.record
    ttfb = None if record.first_byte is None else round(record.first_byte - record.started, 3)
    state = "streaming" if record.first_byte is not None else "retrying" if record.attempts > 1 else "waiting"
    state = state if exchange.uses_model else "reading"
    user = record.caller if exchange.uses_model or exchange.is_read_for_model else ""
    return [
        record.request_id, user, record.model, record.sent_model, record.provider, record.key, state, record.when, ttfb,
        record.bytes_sent, record.attempts,
    ]  # fmt: skip


class History:
    """What was used, and by whom: by the ledger where there is one, else as far as it is in memory, since the start."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._reader = Worker()

    async def usage(self, user: Optional[str], first: str, last: str, by: Sequence[str], daily: bool) -> bytes:
        """The answer of /api/usage: sums from one day to another, which is included. `user`: of no one else."""
        prices, path = self._service.config.prices, self._service.ledger.file
        about = {"from": first, "to": last, "by": list(by), "priced": prices and (prices.as_of or True)}
        if not path:
            return usage_body(about, self._usage_in_memory(user, by), self._usage_in_memory(user, ()))
        hours = int((window_end(first) - 86400) // 3600), int(window_end(last) // 3600)

        def read() -> bytes:
            total = summed_usage(path, *hours, (), user)
            parts = daily_usage(path, *hours, by, user) if daily else [summed_usage(path, *hours, by, user)]
            groups = itertools.islice(itertools.chain.from_iterable(parts), LEDGER_GROUPS)
            return usage_body(about, list(groups), total)

        return await self._read(read)

    def _usage_in_memory(self, user: Optional[str], by: Sequence[str]) -> Groups:
        series = self._service.workers.tally().by(*(GROUPS.index(name) for name in by), user=user)
        groups = [(dict(zip(by, names)), sums_of(sums)) for names, sums in series.items()]
        return sorted(groups, key=lambda group: [figure or 0 for figure in (group[1][COST], group[1][0])], reverse=True)

    async def requests(self, query: dict[str, str]) -> bytes:
        """The answer of /api/requests."""
        path, limit = self._service.ledger.file, max(1, min(int(query.get("limit") or 200), ROWS_AT_ONCE))
        before = int(query.get("before") or 0) or 2**62
        names = {name: query[name] for name in ("user", "model", "key") if query.get(name)}
        errors = query.get("errors") == "1"
        if path:
            return await self._read(lambda: requests_body(*request_page(path, before, limit, errors=errors, **names)))
        await self._service.workers.gather()
        rows = self._requests_in_memory(before, limit, names, errors)
        following = rows[-1]["id"] if rows and len(rows) == limit else None
        return await self._read(lambda: requests_body(rows, following))

    def _requests_in_memory(self, before: int, limit: int, names: Mapping[str, str], errors: bool) -> list[JsonDict]:
        rows = sorted(self._service.workers.tally().ended, key=row_number, reverse=True)
        found = ({"id": row_number(row), **row._asdict()} for row in rows if row.matches(names, errors))
        return list(itertools.islice((row for row in found if row["id"] < before), limit))

    async def hours(self, user: Optional[str]) -> list[list[Any]]:
        """The last TALLIED_HOURS hours: their number since 1970, requests, errors, input with what was written to a
        cache, what was read from one, output, cost."""
        path, since = self._service.ledger.file, int(time.time() // 3600) - TALLIED_HOURS + 1
        if path:
            rows = await self._read(lambda: hour_rows(path, since, user))
        else:
            await self._service.workers.gather()
            sums: dict[int, list[int]] = {}
            for (hour, owner), figures in self._service.workers.tally().hours.items():
                if user in (None, owner) and hour >= since:
                    add_to(sums.setdefault(hour, [0] * len(SUMS)), figures)
            rows = [[hour, *sums[hour]] for hour in sorted(sums)]
        named = (dict(zip(("hour", *SUMS), row)) for row in rows)
        return [
            [it["hour"], it["requests"], it["errors"], it["input"] + it["cache_write"] + it["cache_write_long"],
             it["cache_read"], it["output"], it["cost"]]
            for it in named
        ]  # fmt: skip

    async def _read(self, read: Callable[[], Result]) -> Result:
        """What read() returns, called in a thread, in the turn of who asks. Raises Unavailable."""

        def attempt() -> Result:
            try:
                return read()
            except (sqlite3.Error, ValueError) as error:
                raise Unavailable(f"the ledger can't be read: {error}", "ledger_unreadable") from None

        return await in_thread(self._service.loop, attempt, self._reader)


class LoginGate:
    """Slows down who guesses passwords, and computes few of their hashes at a time, in one thread: scrypt takes 16 MiB,
    and glibc would keep as much for every thread that has ever called it."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._attempts = Throttle()
        self._worker = Worker()
        # By whether somebody has logged in from the address, and by site: the address, or SITE_BITS of it.
        self._waiting: collections.Counter[tuple[bool, str]] = collections.Counter()
        # Addresses from which somebody has logged in have places of their own, and the others theirs.
        self._trusted: collections.OrderedDict[str, None] = collections.OrderedDict()

    def admit(self, username: str, address: str) -> None:
        """Counts an attempt. Raises RateLimited for one too many from the address, or for the user from there."""
        network = network_of(address)
        for name, limit in ((network, LOGINS_PER_ADDRESS), (f"{network} {username[:100]}", LOGINS_PER_USER)):
            wait = self._attempts.wait_seconds(name, limit, self._loop.now)
            if wait:
                raise RateLimited(f"too many logins; again in {math.ceil(wait)} s", wait)

    async def check(self, given: str, hashed: str, address: str) -> bool:
        """Whether the hash is that of the password. Raises RateLimited while too many wait for that, or as many from
        the same site as it leaves places for others."""
        network, site = network_of(address), network_of(address, SITE_BITS)
        is_trusted = network in self._trusted
        left = LOGINS_WAITING - sum(count for (known, _), count in self._waiting.items() if known == is_trusted)
        if self._waiting[is_trusted, site] >= left:
            raise RateLimited("too many logins at a time; try again in a moment", 1)
        self._waiting[is_trusted, site] += 1
        try:
            right = await in_thread(self._loop, lambda: check_password(given, hashed), self._worker, site)
        finally:
            self._waiting[is_trusted, site] -= 1
            self._waiting += collections.Counter()  # forgets those that have none
        if right:
            self._trusted[network] = None
            self._trusted.move_to_end(network)
            if len(self._trusted) > TRUSTED_ADDRESSES:
                self._trusted.popitem(last=False)
        return right


M_ARENA_MAX, M_MMAP_THRESHOLD = -8, -3  # mallopt(3)
MMAP_THRESHOLD_BYTES = 128 * 1024  # glibc's own at the start


def find_malloc_trim() -> Callable[[int], object]:
    """glibc's malloc_trim(), which returns free memory to the system, or a function that does nothing. To be called
    before other threads begin."""
    try:
        import ctypes

        c_library = ctypes.CDLL(None)
        # malloc_trim() doesn't shrink the arenas that glibc gives to other threads than the first; so there are none.
        c_library.mallopt(M_ARENA_MAX, 1)
        # It would grow with each large block that is freed, and such blocks stay in the heap then, in holes.
        c_library.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
        return c_library.malloc_trim
    except (ImportError, OSError, AttributeError, TypeError):
        return lambda kept: None


NEVER_COLLECTED = 10**9  # passes over younger objects, before Python looks at all of them by itself


def collect_rarely() -> None:
    """Leaves it to collect() when Python looks at all objects for those that only hold each other; at those that are
    here from the start it never does. From Python 3.14 on it does so in small steps, and goes on with that."""
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], NEVER_COLLECTED)


def collect() -> None:
    """Frees objects that only hold each other, where that is left to this function."""
    if gc.get_threshold()[2] == NEVER_COLLECTED:
        gc.collect()


# ==== Endpoints ==================================================================================
#
# An Exchange is one request and what becomes of it; an endpoint is a function from an exchange to its Response, or to a
# RelayError. ENDPOINTS, at the end, says what stands at which path. First come the relay's own endpoints, then what its
# owner and each user can see, with the LivePage; then what is relayed, and what is translated on the way.

# What is stored here belongs to one account: to the first provider, whatever it is about.
STORED_PATHS = ("/v1/messages/batches/", "/v1/files/")
# What is told of here has URLs that clients follow with the relay's token; of videos, OpenRouter's and new-api's:
# https://openrouter.ai/docs/guides/overview/multimodal/video-generation, and new-api's taskcommon/helpers.go.
FOLLOWED_PATHS = ("/v1/messages/batches/", "/v1/videos/", "/v1/video/generations/")
# What is kept here by the account that made it: any key may have been the one.
SEARCHED_PATHS = (
    "/responses/", "/conversations/", "/chat/completions/", "/videos/", "/containers/", "/fine_tuning/jobs/",
)  # fmt: skip
# The same where xAI (once), Perplexity and Bifrost give a response that was to come later, and tell its usage.
DEFERRED_PATHS = ("/chat/deferred-completion/", "/async/")
# What is made here for a model, at Mistral too, belongs to an account, as do the files and agents that it is made from:
# to that of the first key, by which all of these go.
MAKING_PATHS = (
    "/agents/", "/assistants/", "/audio/agents/", "/batch/jobs/", "/conversations/", "/dreams/", "/fine_tuning/jobs/",
    "/realtime/", "/threads/",
)  # fmt: skip
# Where OpenRouter and Open WebUI make a lasting key of whoever has one; Venice, Portkey and LiteLLM (for each new user,
# too) do so if they are asked with a key that may.
KEY_PATHS = ("/auth/keys/", "/auths/", "/keys/", "/api_keys/", "/api-keys/", "/key/", "/user/new/")
# What counts tokens, and uses none; the first may be translated.
COUNTING_PATH = "/messages/count_tokens"
COUNTING_PATHS = (COUNTING_PATH, "/responses/input_tokens")
CREATING_PATHS = ("/v1/batches/", "/v1/files/", "/v1/messages/batches/")  # what is sent here is never sent twice
# By these some servers take a request for one of another method.
METHOD_OVERRIDES = frozenset({"x-http-method-override", "x-http-method", "x-method-override", "x-http-override"})
# By these some gateways (Portkey, Helicone, Azure's endpoints with several deployments, those of Kubernetes and llm-d,
# Doubleword's, Plano, vLLM's, Bifrost, Respan) are told which model is to answer, or who; and Azure, which draws.
MODEL_OVERRIDES = frozenset({
    "x-portkey-config", "x-portkey-provider", "x-portkey-virtual-key", "x-portkey-custom-host", "helicone-fallbacks",
    "helicone-target-url", "helicone-openai-api-base", "azureml-model-deployment", "x-gateway-model-name",
    "x-gateway-base-model-name", "x-gateway-model-name-rewrite", "x-llm-d-model-name-rewrite", "model-override",
    "x-arch-llm-provider-hint", "x-selected-model", "x-portkey-azure-deployment-id", "x-portkey-azure-foundry-url",
    "x-ms-oai-image-generation-deployment", "x-bf-fallbacks", "x-ms-model-mesh-model-name",
    "x-respan-params", "x-data-keywordsai-params",
})  # fmt: skip
# Bodies that are read for a model on paths of which the relay knows nothing: JSON, and what curl and
# careless clients call JSON. All others stream through.
READ_TYPES = frozenset({"application/json", "text/plain", "text/json", "application/x-www-form-urlencoded", ""})
FORM_TYPE = "multipart/form-data"
# Where the field `model` of a form is what decides which model works.
FORM_PATHS = frozenset(
    {"/v1/audio/transcriptions", "/v1/audio/translations", "/v1/images/edits", "/v1/images/variations"}
)
# Where a path names the model, for some servers; for LiteLLM, it may have slashes in it.
DEPLOYMENT = re.compile("/(?:engines|deployments)/(.+?)(?:/(?:(?:audio|chat|images)/)?[^/]+)?/?$")
# Where Gemini's own format is spoken, such as /models/NAME:generateContent (https://google.aip.dev/136), of which
# new-api and Bifrost look at the beginning only. What Vertex AI calls raw is the format of the model's own maker.
GEMINI_PATH = re.compile("(?i)(?:^|/v1beta)/models/|:(?!(?:stream)?rawPredict$)[a-z]+/?$")
# What no server behind can take for another kind of body, or another alphabet, than the relay has read.
PLAIN_FORM_TYPE = re.compile(r"(?i)multipart/form-data; ?boundary=(?:[a-z0-9'+_.-]{1,70}|\"[a-z0-9'+_.-]{1,70}\")")
PLAIN_JSON_TYPE = re.compile(
    r"(?i)(?:(?:application/(?:[a-z0-9.-]+\+)?|text/)json|text/plain)?(?:; *(?:charset=\"?utf-?8\"?)?)*"
)
# In a name, what some servers read as more than one, or as another: a list with commas; the end of it at a control
# character, such as a NUL; and, where the name becomes a part of a URL (by LiteLLM, in front of Gemini), what ends or
# turns the path there, to which an alias with a * may add the slash. OpenRouter's `@preset/` is `preset`, see
# MODEL_NAMES.
ODD_MODEL = re.compile(r"[,\x00-\x1f\x7f?#%;]|\.\.|@preset/")
Answerer = Callable[["Exchange"], Coroutine[float, None, Response]]


class Endpoint(NamedTuple):
    """An endpoint: the function that answers, for which methods, and what the rules ask of the path."""

    answer: Answerer
    methods: tuple[str, ...]
    path: str = ""  # behind /v1, as it goes upstream
    open: bool = False  # whether it needs no token
    by_model: bool = False  # whether the body's top-level `model` is what decides which model works
    creates: bool = False  # whether what is sent there must never be sent twice
    beta: bool = False  # whether the path stands for `beta=true` in the query
    is_followed: bool = False  # whether what it answers may hold URLs that clients follow with their token

    def target(self, query: str) -> str:
        """Path and query upstream, behind /v1, for the query of a request."""
        if self.beta and "beta=true" not in query.split("&"):
            query = f"{query}&beta=true" if query else "beta=true"
        return f"{self.path}?{query}" if query else self.path


class Exchange:
    """One request, and what becomes of it."""

    def __init__(self, service: Service, channel: Channel, address: str) -> None:
        self.service = service
        self.loop = service.loop
        self.channel = channel  # to the client
        self.address = address
        self.config, self._targets = service.routing
        self.record = AccessRecord(time.time(), self.loop.now)
        self.record.client = address
        self.head: Optional[RequestHead] = None  # None for one that can't be read
        self.request: RequestHead  # the same, when it has been read
        self.format = ""
        self.endpoint: Endpoint  # when it has been found
        self.caller = ANONYMOUS
        self.uses_model = False  # whether it is to have a model do something, which may cost
        self.is_read_for_model = False  # whether its body is read for the model that will do so
        self.may_tell_usage = False  # whether it may use a model that it doesn't name, as its answer will tell
        self._incoming: Optional[RequestBody] = None  # its body, as far as it is being read
        self._read: Optional[ReadBody] = None  # the same, when it has been read for its model
        self._held = 0  # bytes that it has taken room for, see hold()

    # -- its response

    def respond(
        self, status: int, document: Optional[JsonDict] = None, fields: Iterable[tuple[str, str]] = ()
    ) -> Response:
        """A response of the relay's own, in JSON or without a body. Raises Unavailable."""
        return self.respond_with(b"" if document is None else json.dumps(document).encode("ascii"), fields, status)

    def respond_with(self, body: bytes, fields: Iterable[tuple[str, str]], status: int = 200) -> Response:
        """A response of the relay's own. Raises Unavailable for a long one that there is no room for."""
        if len(body) > RECEIVE_BYTES:  # held for as long as its client takes it
            self.hold(len(body))
        return own_response(status, body, [*fields, *self.cors()], self.record.request_id)

    def error_response(self, error: RelayError) -> Response:
        """The response that tells the client what went wrong, in the format of its API."""
        record = self.record
        record.error = error.code
        fields = [*error.headers, ("x-monorelay-error", error.code)]
        if error.lasts:  # the SDKs and Claude Code would try for minutes, in silence
            fields.append(("x-should-retry", "false"))
        if record.attempts:
            fields += [
                ("x-monorelay-provider", header_text(record.provider)),
                ("x-monorelay-attempts", str(record.attempts)),
            ]
        body = error_body(self.format, error.kind, error.message, error.code, record.request_id, error.details)
        return own_response(error.status, body, [*fields, *self.cors()], record.request_id, error.close)

    def cors(self, relayed: Iterable[tuple[str, str]] = ()) -> Pairs:
        """What lets a browser's script of another origin read the response, if it may; never what the page shows."""
        origins, head = self.config.server.cors_origins, self.head
        if not origins or not head or known_form(head.path[:TELLING_PATH_CHARACTERS]) in PAGE_PATHS:
            return []
        return cors_fields(origins, head.fields, relayed)

    def let_go_of_head(self) -> None:
        """Lets go of the request's fields where no token is among them: for its response they are needed no more, and
        may be long."""
        if self.head and self.caller is ANONYMOUS:
            self.head = self.request = self.head._replace(fields=Headers([]))

    async def read_left(self, relayed: Optional[UpstreamResponse]) -> None:
        """Reads the rest of a model's whole answer whose client has left, as long as that comes without a pause: what
        was used, which costs all the same, is told at its end. Sound, say, and what is compressed tell nothing."""
        if not relayed or not self.record.usage.is_document or not (self.uses_model or self.may_tell_usage):
            return
        loop, channel, decoder = self.loop, relayed.channel, relayed.decoder
        latest = loop.now + LEFT_LONGEST_SECONDS
        with contextlib.suppress(Overdue, FramingError, Unavailable):  # the latter: the relay shuts down
            while not decoder.finished and (channel.received or not channel.ended) and loop.now < latest:
                if not channel.received:
                    await channel.arrival(loop.now + LEFT_SECONDS)
                self.record.usage.read(decoder.feed(await take_in_turn(loop, channel)), False)

    # -- its query

    def read_query(self, *names: str) -> dict[str, str]:
        """The parameters of the query that have a value. Raises BadRequest for others than these, and repeated ones."""
        try:
            pairs = parse_qsl(self.request.query, max_num_fields=QUERY_FIELDS, errors="replace")
        except ValueError:
            raise BadRequest(f"the query has more than {QUERY_FIELDS} parameters") from None
        query = dict(pairs)
        for name in query:
            if name not in names:
                raise BadRequest(f"{name[:100]}: unknown parameter{suggestion(name[:100], names)}")
        if len(query) < len(pairs):
            raise BadRequest("a parameter is given twice")
        return query

    # -- what its caller may do

    def own_name(self) -> Optional[str]:
        """The name of a caller who may see only what is his own; None for one who sees all."""
        return None if self.caller.sees_all else self.caller.name[:LOGGED_CHARACTERS]

    @property
    def allowed(self) -> Optional[tuple[str, ...]]:
        """The caller's `models`; None for one who may use all."""
        return self.caller.user.models if self.caller.user else None

    def may_use(self, model: str) -> bool:
        """Whether the caller's `models` admit the name."""
        return self.allowed is None or admits(self.config, self.allowed, model)

    def check_may_call(self) -> None:
        """Raises Forbidden for a viewer, who may have no model do anything, and for whoever isn't the owner
        where a provider would make a key: what is used with that passes this relay by."""
        if self.caller.user and self.caller.user.viewer:
            raise Forbidden(f"{self.caller.name} is a viewer, who may look and call no model")
        path = unquote(self.endpoint.path).lower()  # as some servers read it
        makes_key = is_within(path, KEY_PATHS) and self.request.method not in READING
        if makes_key and not self.caller.admin:
            raise Forbidden(f"{self.record.caller} may not have the provider make a key; an access key may")

    def check_model(self, facts: BodyFacts) -> None:
        """Raises Forbidden unless the caller may use the model, and a server behind can't take another one from the
        request than the relay does."""
        self.uses_model = self.endpoint.path not in COUNTING_PATHS
        # OpenRouter may answer by one of `models`, LiteLLM by one that the query, another path or what it
        # reads as a form names, and Portkey and Helicone by one that a header names; that is charged.
        named_elsewhere = "model" in unquote(self.request.query) or not MODEL_OVERRIDES.isdisjoint(self.request.fields)
        is_json = PLAIN_JSON_TYPE.fullmatch(self.request.fields.get("content-type", ""))
        named_elsewhere = named_elsewhere or not (self.endpoint.by_model and is_json)
        self.record.usage.seeks_model = facts.lookalike or named_elsewhere
        self.record.other_model = self.model_beside
        self.check_may_call()
        if not self.may_use(facts.model):
            only = f"only {listing(self.allowed)}" if self.allowed else "nor any other"
            raise Forbidden(f"{self.record.caller} may not use the model {facts.model!r}, {only}")
        if self.is_restricted():
            self._check_name(facts.model)
            if self._is_ambiguous(facts):
                raise hidden_model(self.caller)

    @property
    def model_beside(self) -> str:
        """The model that the query or the path names: LiteLLM may answer by that, and doesn't say so when it answers
        with pictures."""
        query, path = self.request.query, DEPLOYMENT.search(unquote(self.endpoint.path))
        asked = dict(parse_qsl(query)).get("model", "") if "model" in unquote(query) else ""
        return (asked or (path[1] if path else ""))[:MODEL_CHARACTERS]

    def is_restricted(self) -> bool:
        """Whether the caller may use some models only. Raises Forbidden for such a one who names another method or
        model in a header than the request has: a server behind may heed that."""
        if self.allowed is None:
            return False
        given = as_hyphenated(self.request.fields.names)
        # LiteLLM and Bifrost pass on those that begin so without that.
        names = {name.removeprefix("x-pass-").removeprefix("x-bf-eh-") for name in given}
        what = "method" if names & METHOD_OVERRIDES else "model" if names & MODEL_OVERRIDES else ""
        if what:
            raise Forbidden(f"{self.caller.name} may use some models only, and no header that names another {what}")
        return True

    def _check_name(self, model: str) -> None:
        """Raises Forbidden for the name of a model in which a server behind may read another one."""
        if ODD_MODEL.search(model) and model not in (self.allowed or ()):
            raise Forbidden(
                f"{self.record.caller} may use some models only, and another may be read in the name {model!r}; "
                "it has to stand in the user's `models` as it is"
            )

    def _is_ambiguous(self, facts: BodyFacts) -> bool:
        """Whether a server behind may take another model from the request than the relay does."""
        fields, query = self.request.fields, unquote(self.request.query).casefold()
        plain_type, decides = PLAIN_JSON_TYPE, self.endpoint.by_model
        if media_type(fields) == FORM_TYPE:
            plain_type, decides = PLAIN_FORM_TYPE, f"/v1{self.endpoint.path}" in FORM_PATHS
            decides = decides and fields.get("content-encoding", "identity").lower() == "identity"  # it is read as is
        names = as_hyphenated(fields.names)
        is_plain = plain_type.fullmatch(fields.get("content-type", "")) and not any(
            names.count(name) > (name in fields) for name in ("content-type", "content-encoding")
        )
        # Some servers take what the query says, as well.
        in_query = any(name in query for name in ("model", "engine", "deployment", "_method"))
        return facts.lookalike or in_query or not decides or not is_plain

    def targets_of(self, model: str) -> list[Target]:
        """The targets of a model. Raises Unavailable, and NotFound, which names other models only to a caller who may
        use all of them."""
        try:
            return self._targets(model, self.format, self.endpoint.path in TRANSLATED_PATHS)
        except NotFound as error:
            if not self.is_restricted():
                raise
            raise NotFound(f"no route for the model {model!r} at this path", error.code) from None

    def count(self, may_cost: bool = False) -> None:
        """Counts a request that is let through to a model; `may_cost`: it may cost what its answer won't tell. Raises
        RateLimited, BudgetExceeded, and Forbidden for what can't be counted of a user who has a budget."""
        user, workers = self.caller.user, self.service.workers
        workers.look()
        if user and user.has_budget and (self.uses_model or may_cost):
            if "," in self.record.model + self.record.other_model:  # LiteLLM asks each, and answers with a list
                raise Forbidden(f"{self.record.caller} has a budget, and may use one model at a time")
            if GEMINI_PATH.search(unquote(self.endpoint.path)):
                raise Forbidden(f"{self.record.caller} has a budget, and what Gemini's own format tells isn't counted")
            over = spent_over(user, functools.partial(self.service.ledger.spent, user.name), time.time())
            if over:
                raise BudgetExceeded(over.message, over.ends - time.time())
        limit = user.requests_per_minute if user else 0
        if limit:
            wait = self.service.requests.wait_seconds(self.caller.name, limit, self.loop.now)
            if wait:
                raise RateLimited(
                    f"{self.caller.name} is over {limit} requests a minute; again in {math.ceil(wait)} s", wait
                )

    # -- its body

    @property
    def body_limit(self) -> int:
        """How many bytes a body may have that is read for its model."""
        return int(self.config.server.max_body_mb * MEGABYTE)

    @property
    def body_ended(self) -> bool:
        """Whether nothing of the body is still to come."""
        return self._incoming.finished if self._incoming else self.request.body_length == 0

    def open_body(self, limit: int, setting: str = "") -> RequestBody:
        """The body, still to be read; the setting is where its limit comes from. Raises TooLarge."""
        self._incoming = RequestBody(self.channel, self.request, limit, self.loop, setting)
        if self.caller is not ANONYMOUS:
            self._incoming.waited = functools.partial(check_again, self.service, self.config, self.caller, self.request)
        return self._incoming

    def open_upload(self) -> RequestBody:
        """The body, to be passed on as it comes. Raises TooLarge."""
        return self.open_body(int(self.config.server.max_upload_mb * MEGABYTE), "max_upload_mb")

    async def read_body(self, required: bool) -> ReadBody:
        """The body, read for its model, which must be there if it is required. Raises BadRequest, TooLarge,
        UnsupportedCoding and Unavailable."""
        coding = (self.request.fields.get("content-encoding") or "identity").lower()
        incoming = self.open_body(self.body_limit, "max_body_mb")
        body = ReadBody(self.allowed is not None)
        encoded: list[bytes] = []
        while not incoming.finished:
            piece = await incoming.read()
            self.hold(len(piece))
            if coding == "identity":
                body.add(piece)
                if body.behind:
                    await self.catch_up(body)
            else:
                append_piece(encoded, piece)
        if any(encoded):
            body.sent = encoded
            await self._inflate(Inflater(encoded, coding), body)
        if body.size > AT_ONCE_BYTES:
            await checkpoint(self.loop)
        body.finish()
        if body.behind:
            await self.catch_up(body)
        if not body.facts and (required or body.problem[1] == "bad_request"):
            raise BadRequest(*body.problem)
        self._read = body
        return body

    def form_walk(self, anywhere: bool = False) -> FormWalk:
        """What looks for the model of the form that this request says it has."""
        boundary = FORM_BOUNDARY.search(self.request.fields.get("content-type", ""))
        return FormWalk((boundary[1] or boundary[2]) if boundary else "", anywhere)

    async def read_form(self, body: RequestBody) -> FormWalk:
        """What a form says of its model: the field must stand before its file, and in its first FORM_SEEN_BYTES. What
        was read is put back. Raises BadRequest, TooLarge and Unavailable."""
        form, pieces = self.form_walk(), [b""]
        while not form.settled and form.seen < FORM_SEEN_BYTES and not body.finished:
            piece = await body.read()
            self.hold(len(piece))
            append_piece(pieces, piece)
            form.feed(piece[: FORM_SEEN_BYTES - form.seen])
        body.put_back(b"".join(pieces), form.span)
        return form

    async def _inflate(self, inflater: Inflater, body: ReadBody) -> None:
        """Adds the content of a compressed body. Raises BadRequest, TooLarge and Unavailable."""
        while not inflater.finished:
            piece = inflater.go_on()
            self.hold(len(piece))
            body.add(piece)
            if body.size > self.body_limit:
                limit = size_text(self.body_limit, "max_body_mb")
                raise TooLarge(f"the decompressed body is over this relay's limit of {limit}")
            await checkpoint(self.loop)
            await self.catch_up(body)

    async def catch_up(self, body: ReadBody) -> None:
        """Does the body's work in steps; between two of them others go on."""
        while body.behind:
            await checkpoint(self.loop)
            body.go_on()

    async def skip_body(self) -> bool:
        """Drains an unread body, so that the connection can be kept; False if it can't."""
        return await (self._incoming or self.open_body(LENGTHS)).discard()  # which takes no long one

    def hold(self, count: int) -> None:
        """Takes room for so many bytes. Raises Unavailable."""
        if count:
            self.service.bodies.claim(count, self._user_name, self._held)
            self._held += count

    @property
    def _user_name(self) -> str:
        """The user whose room its body takes, also one who isn't in relay.json; empty for the owner."""
        return "" if self.caller.admin else self.caller.name[:LOGGED_CHARACTERS]

    def release_room(self, count: int) -> None:
        """Gives back room for so many bytes."""
        if count:
            self.service.bodies.release(count, self._user_name)
            self._held -= count

    def let_go(self, but: int = 0) -> None:
        """Drops the body, and gives back its room, `but` what something else takes."""
        self.release_room(self._held - but)
        self.drop_body()
        if self._incoming:
            self._incoming.watch = None  # which knows this exchange, and would keep it
            self._incoming.begun = b""  # nothing of a form is sent again, either

    def drop_body(self) -> None:
        """Lets go of the bytes of the body: nothing of it is sent any more."""
        if self._read:
            self._read.drop()
            self._read = None


def check_again(service: Service, admitted_by: Config, caller: Caller, request: RequestHead) -> None:
    """Raises Unauthenticated for a caller who was removed since the request began, and Forbidden for one who may do
    something else by now: its body may take days to come."""
    if service.config is admitted_by:
        return
    now = identify(shown_tokens(request.fields), service.config, time.time())
    before, after = ((it.name, it.user and (it.user.models, it.user.viewer)) for it in (caller, now))
    if before != after:
        raise Forbidden(
            f"what {caller.name[:LOGGED_CHARACTERS]} may use has changed while this request came; send it again"
        )


def hidden_model(caller: Caller) -> Forbidden:
    """The error for a user who may use some models only, where others may be named out of sight."""
    return Forbidden(
        f"{caller.name} may use some models only, and what this request would use can't be seen here; "
        "send application/json with one `model`, or a form with one before its file, and no other in the query, "
        "`fallbacks`, `tools` or `svg`"
    )


def origin_of(caller: Caller, network: str) -> str:
    """The origin of a caller's tasks, see FairQueue. A user is one origin, whatever the address. The owner's access key
    may be shared, and a proxy's address too: for other callers it is network and name together."""
    return f"user {caller.user.name}" if caller.user else f"{network} {caller.name[:LOGGED_CHARACTERS]}"


def shutting_down() -> Unavailable:
    """The error for requests that the relay can't serve to the end."""
    return Unavailable("this relay is shutting down", "shutting_down")


# -- the relay's own endpoints


async def answer_preflight(exchange: Exchange) -> Response:
    """Tells a browser what a script of another origin may send."""
    return exchange.respond(204, fields=preflight_fields(exchange.request.fields))


async def answer_alive(exchange: Exchange) -> Response:
    """Responds without a body, as Claude Code's probes expect."""
    return exchange.respond(200)


async def answer_health(exchange: Exchange) -> Response:
    """Tells a monitor that the relay serves."""
    return exchange.respond(200, {"status": "ok", "version": __version__})


async def answer_telemetry(exchange: Exchange) -> Response:
    """Takes Claude Code's telemetry, and forgets it."""
    body = exchange.open_body(exchange.body_limit, "max_body_mb")
    while not body.finished:
        await body.read()
    return exchange.respond(204)


async def answer_login(exchange: Exchange) -> Response:
    """Exchanges a user's name and password for tokens."""
    given = await read_login(exchange, "username", "password")
    username, users, gate = given["username"], exchange.config.users, exchange.service.logins
    gate.admit(username, exchange.address)
    user = users.get(username)
    # Somebody unknown costs the same time as a wrong password of the others.
    usual = next((other.password for other in users.values() if other.password), DUMMY_HASH)
    hashed = user.password if user and user.password else usual
    right = await gate.check(given["password"], hashed, exchange.address)
    secret = exchange.config.server.jwt_secret
    if not (right and user and user.enabled and user.password and secret):
        raise Unauthenticated("the username or the password is wrong", "login_failed")
    return token_response(exchange, username, exchange.config, secret)


async def answer_refresh(exchange: Exchange) -> Response:
    """Exchanges a refresh token for new tokens."""
    given = await read_login(exchange, "refresh_token")
    config = exchange.service.config  # that of now: new tokens would outlive what has ended this one meanwhile
    secret = config.server.jwt_secret
    if not secret:
        raise Unauthenticated("this relay issues no tokens: server.jwt_secret is not set")
    claims = verify_token(given["refresh_token"], secret.reveal(), time.time())
    return token_response(exchange, subject(claims, "refresh", config), config, secret)


def token_response(exchange: Exchange, username: str, config: Config, secret: Secret) -> Response:
    """The response that brings new tokens."""
    exchange.record.caller = username[:LOGGED_CHARACTERS]
    tokens = issue_tokens(username, config, secret, time.time())
    return exchange.respond(200, tokens, [("cache-control", "no-store")])


async def read_login(exchange: Exchange, *names: str) -> dict[str, str]:
    """The strings of a small JSON object. Raises BadRequest."""
    body = exchange.open_body(LOGIN_BODY_BYTES)
    body.must_come_within(HEAD_SECONDS)
    content = await body.read_all()
    await checkpoint(exchange.loop)
    try:
        given = parse_json(content)
    except ValueError as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(given, JsonObject) or given.repeated:
        raise BadRequest("the body must be a JSON object without repeated names")
    for name in names:
        if not isinstance(given.get(name), str):
            raise BadRequest(f"{name}: a string is required")
    return {name: given[name] for name in names}


async def answer_me(exchange: Exchange) -> Response:
    """Tells whose token it is, how long it lasts, and what its user may do: the limits, and what is left of them."""
    caller, user, service = exchange.caller, exchange.caller.user, exchange.service
    a_minute = user.requests_per_minute if user else 0
    document = {
        "username": caller.name,
        "admin": caller.admin,
        "viewer": caller.sees_all and not caller.admin,
        "expires": caller.expires,
        "models": exchange.allowed,
        "requests_per_minute": a_minute or None,
        "requests_left": service.requests.left(caller.name, a_minute, exchange.loop.now) if a_minute else None,
        "budgets": service.budgets([user]) if user else [],
    }
    return exchange.respond(200, document)


async def answer_catalogue(exchange: Exchange) -> Response:
    """The relay's models, or one of them."""
    listed = await exchange.service.catalogue.entries(exchange.config)
    exchange.hold(len(listed) * LISTED_ENTRY_BYTES)
    await checkpoint(exchange.loop)  # to make a long page takes some milliseconds
    entries = []
    async for entry in in_steps(exchange.loop, listed):  # of many routes, each may have to be looked at
        if exchange.may_use(entry["id"]) and callable_targets(exchange.config, entry["id"], exchange.format):
            entries.append(entry)
    wanted = unquote(exchange.endpoint.path[len("/models/") :])
    if not wanted:
        page = model_page(entries, exchange.request.query, exchange.format)
        return exchange.respond_with(await written_page(exchange, page), ())
    for entry in entries:
        if entry["id"] == wanted:
            return exchange.respond(200, model_entry(entry, exchange.format))
    possible = callable_targets(exchange.config, wanted[:MODEL_CHARACTERS], exchange.format)
    targets = [target for target in possible if target.provider.format == exchange.format]
    if targets and exchange.may_use(wanted):
        exchange.endpoint = exchange.endpoint._replace(path=f"/models/{quote(targets[0].model)}")
        order = exchange.service.relay.keys.order(targets[:1], exchange.caller.name, exchange.loop.now, is_aside=True)
        return await relay(exchange, ReadBody(), order)
    meant = suggestion(wanted, (entry["id"] for entry in entries))
    raise NotFound(f"there is no model {wanted[:MODEL_CHARACTERS]!r}{meant}")


async def written_page(exchange: Exchange, page: JsonDict) -> bytes:
    """A page of the list as JSON, written entry by entry: one full of numbers with a fraction takes 0.2 s. Raises
    Unavailable where many are being written, and there is no room for one more."""
    written, size = [], 0
    async for entry in in_steps(exchange.loop, page["data"]):
        written.append(json.dumps(model_entry(entry, exchange.format)).encode("ascii"))
        exchange.hold(len(written[-1]))
        size += len(written[-1])
    exchange.release_room(size)  # the response takes it anew
    return with_list({**page, "data": []}, written)


# -- what the owner, and each user, can see of what happens


class LivePage:
    """The events of /api/live: first the state of everything, then, each second, what has changed."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._service = exchange.service
        self._loop = exchange.loop
        self.caller = exchange.caller
        self._service.pages[self] = None
        self._task = exchange.loop.current
        self._is_sending = False  # whether its client hasn't taken the last event yet
        self._config = self._service.config  # that of the last event
        self._last: JsonDict = {}  # the state that it was told last
        self._told: Optional[dict[str, int]] = None  # the ended requests that it was told of, and when they ended
        self._hours: list[list[Any]] = []
        self._hours_at = -math.inf
        seen = exchange.request.fields.get("last-event-id", "")
        # Until when it knows what has ended, in milliseconds since 1970; 0 for one that knows nothing.
        self._known_until = int(seen) // 4096 if re.fullmatch("[0-9]{1,16}", seen) else 0

    def close(self) -> None:
        """Gives up its place among the pages."""
        self._service.pages.pop(self, None)

    def end(self) -> None:
        """Ends it at once if its client takes nothing; else it ends when it next checks whether it may go on."""
        if self._is_sending:
            self._task.resume(shutting_down())

    async def next(self) -> bytes:
        """The next event, or a comment where nothing has happened for long; nothing at the end."""
        self._is_sending = False
        event = await self._next()
        self._is_sending = True
        return event

    async def _next(self) -> bytes:
        quiet_until = self._loop.now + LIVE_QUIET_SECONDS
        while True:
            if self._last:
                await sleep(self._loop, LIVE_SECONDS)
            await checkpoint(self._loop)  # many pages may begin, or be due, at one moment
            if not self._may_go_on():
                return b""
            news = await self._news()
            if len(news) > 1:
                name = "state" if "version" in news else "tick"
                number = max([int(time.time() * 1000) * 4096, *(row[0] for row in news.get("ended", ()))])
                return f"event: {name}\nid: {number}\ndata: {json.dumps(news)}\n\n".encode("ascii")
            if self._loop.now >= quiet_until:
                return b": nothing new\n\n"

    def _may_go_on(self) -> bool:
        """Whether there is still a place for it, and the token holds, for the same caller."""
        exchange = self._exchange
        if self._service.draining or self not in self._service.pages:
            return False
        try:
            caller = identify(shown_tokens(exchange.request.fields), self._service.config, time.time())
        except RelayError:
            return False
        return caller == self.caller

    async def _news(self) -> JsonDict:
        """What has changed since it was last asked; at first, everything."""
        if self._service.config is not self._config:  # by which there may be other keys, and other budgets
            self._config, self._last, self._hours_at = self._service.config, {}, -math.inf
        now = await self._state()
        before, self._last = self._last, now
        if not before:
            return {**now, "ended": self._ended()}
        news = {name: value for name, value in now.items() if name == "now" or value != before[name]}
        for name in ("keys", "hours", "budgets"):
            if name in news:
                pairs = itertools.zip_longest(now[name], before[name])  # in their order, as long as they are the same
                news[name] = [entry for entry, known in pairs if entry not in (None, known)]
        ended = self._ended()
        return {**news, "ended": ended} if ended else news

    async def _state(self) -> JsonDict:
        """The state of everything that the caller may see."""
        exchange, service = self._exchange, self._service
        own, config, clock = exchange.own_name(), service.config, time.time()
        if self._loop.now >= self._hours_at + (HOURS_SECONDS if service.ledger.file else 0):
            self._hours_at = self._loop.now
            with contextlib.suppress(Unavailable):  # what happens now is told all the same
                self._hours = await service.history.hours(own)
        await service.workers.gather()
        keys, budgets = await self._keys_and_budgets(config)
        tally = service.workers.tally()
        since = self._hours[0][0] * 3600 if config.ledger and self._hours else math.inf
        rows = [row for row in service.workers.running() if own in (None, row[RUNNING_USER])]
        running = [[*row] for row in rows[:RUNNING_ROWS]]
        for row in running:
            row[RUNNING_SINCE] = round(max(0.0, clock - row[RUNNING_SINCE]), 1)
        return {
            "now": round(clock, 3),
            "version": __version__,
            "since": round(min(tally.since, since), 3),
            "admin": own is None,
            "ledger": bool(service.ledger.file),
            "unwritten": service.ledger.waiting if own is None and service.ledger.failing else 0,
            "active": len(rows),
            "running": running,
            "keys": keys,
            "minute": last_minute(tally, own, clock),
            "ttfb": quantiles(
                [row.ttfb / 1000 for row in tally.ended if row.ttfb is not None and row.answered and row.is_of(own)]
            ),
            "hours": self._hours,
            "budgets": budgets,
        }

    async def _keys_and_budgets(self, config: Config) -> tuple[list[JsonDict], list[JsonDict]]:
        """Those that the caller may see. There may be thousands: between the steps, others have their turn."""
        service, own = self._service, self._exchange.own_name()
        if own is not None:
            user = config.users.get(own)
            return [], service.budgets([user] if user else [])
        keys = service.workers.keys_of_late(config)
        await checkpoint(self._loop)
        return keys, await service.workers.budgets(config)

    def _ended(self) -> list[list[Any]]:
        """The requests that have ended since it was last asked; at first the last ones, and all that the ledger may not
        have yet."""
        own, told, is_new = self._exchange.own_name(), self._told or {}, not self._known_until
        # What other workers tell comes a little later.
        since, self._known_until = self._known_until - LIVE_LATE_SECONDS * 1000, int(time.time() * 1000)
        rows: list[LedgerRow] = []
        for row in reversed(self._service.workers.tally().ended):
            is_written = row.at < self._known_until - LIVE_LATE_SECONDS * 1000
            if row.at < since or (is_new and is_written and len(rows) >= FIRST_ROWS):
                break
            if row.is_of(own) and row.request not in told:
                rows.append(row)
        kept = {request: at for request, at in told.items() if at >= since}
        self._told = {**kept, **{row.request: row.at for row in rows}}
        return [ended_row(row) for row in reversed(rows)]


def last_minute(tally: Tally, user: Optional[str], clock: float) -> dict[str, int]:
    """How many requests have ended in the last 60 seconds, and how many of them failed."""
    since = clock - 60
    if user is None:
        counts = [counts for second, counts in tally.seconds.items() if second >= since]
        return {"requests": sum(total for total, _ in counts), "errors": sum(failed for _, failed in counts)}
    rows = [row for row in tally.ended if row.at >= since * 1000 and row.user == user]
    return {"requests": len(rows), "errors": sum(row.failed for row in rows)}


def quantiles(values: list[float]) -> Optional[list[float]]:
    """The median, and what 95% of the values don't exceed."""
    ordered = sorted(values)
    return [ordered[math.ceil(len(ordered) * part) - 1] for part in (0.5, 0.95)] if ordered else None


def query_date(query: Mapping[str, str], name: str, default: str) -> str:
    """A day of a query. Raises BadRequest."""
    value = query.get(name) or default
    with contextlib.suppress(ValueError):
        if re.fullmatch("[12][0-9]{3}-[0-9]{2}-[0-9]{2}", value):
            return datetime.date.fromisoformat(value).isoformat()
    raise BadRequest(f"{name}: must be a day such as {default}")


async def answer_metrics(exchange: Exchange) -> Response:
    """All that is counted, for Prometheus."""
    if not exchange.caller.sees_all:
        raise Forbidden("the metrics are for access keys, and for users with `viewer`")
    text = await exchange.service.workers.metrics()
    return exchange.respond_with(text, [("content-type", "text/plain; version=0.0.4; charset=utf-8")])


async def answer_dashboard(exchange: Exchange) -> Response:
    """The page that shows what happens; it holds no data, and asks for a token itself."""
    if not exchange.config.server.dashboard:
        raise NotFound("there is no page here: server.dashboard is false")
    fields = [("content-type", "text/html; charset=utf-8"), ("content-security-policy", dashboard_policy())]
    return exchange.respond_with(page_body(), [*fields, *PAGE_FIELDS])


async def answer_root(exchange: Exchange) -> Response:
    """Leads a browser to the page; tells others only that the relay is there."""
    is_browser = "text/html" in exchange.request.fields.get("accept", "")
    if exchange.request.method == "GET" and is_browser and exchange.config.server.dashboard:
        return exchange.respond(303, fields=[("location", "/dashboard")])
    return await (answer_alive if exchange.request.method == "HEAD" else answer_health)(exchange)


def make_room_for_page(exchange: Exchange) -> None:
    """Where there are too many pages, ends the oldest of the one who has most. Raises Unavailable if that is the
    caller."""
    pages = exchange.service.pages
    if len(pages) < PAGES:
        return
    owned = collections.Counter(page.caller.name for page in pages)
    name, most = owned.most_common(1)[0]
    if most <= owned[exchange.caller.name] + 1:
        raise Unavailable(f"{PAGES} pages follow this relay already; close one", "too_many_pages")
    oldest = next(page for page in pages if page.caller.name == name)
    oldest.close()
    oldest.end()


async def answer_live(exchange: Exchange) -> Response:
    """What happens, as it happens, until the relay drains or the token expires. Raises Unavailable for one too many."""
    make_room_for_page(exchange)
    fields = [("content-type", "text/event-stream"), *UNBUFFERED]
    return exchange.respond(200, fields=fields)._replace(live=LivePage(exchange))


async def answer_usage(exchange: Exchange) -> Response:
    """What was used and what it cost, summed up."""
    query = exchange.read_query("from", "to", "by", "step")
    today, has_ledger = windows(time.time())[0], bool(exchange.service.ledger.file)
    if not has_ledger:
        await exchange.service.workers.gather()
    start = today if has_ledger else windows(exchange.service.workers.tally().since)[0]
    first, last = query_date(query, "from", start), query_date(query, "to", today)
    by = list(dict.fromkeys(query.get("by", "user,model").split(",")))
    for name in by:
        if name not in GROUPS:
            raise BadRequest(f"by: {name[:100]!r} is none of {', '.join(GROUPS)}")
    step = query.get("step", "")
    if step not in ("", "day"):
        raise BadRequest("step: must be day")
    refused = "step" if step else "from" if first > start else "to" if last < today else ""
    if refused and not has_ledger:
        raise BadRequest(
            f"{refused}: this relay keeps no ledger (see relay.json), but the sums since its start, {start}"
        )
    body = await exchange.service.history.usage(exchange.own_name(), first, last, by, step == "day")
    return exchange.respond_with(body, [("content-type", "application/json")])


async def answer_requests(exchange: Exchange) -> Response:
    """The requests that have ended, newest first."""
    query = exchange.read_query("before", "limit", "user", "model", "key", "errors")
    for name, longest in (("before", 16), ("limit", 4)):
        if query.get(name) and not re.fullmatch(f"[0-9]{{1,{longest}}}", query[name]):
            raise BadRequest(f"{name}: must be a number of up to {longest} digits")
    if query.get("errors", "") not in ("", "0", "1"):
        raise BadRequest("errors: must be 0 or 1")
    own = exchange.own_name()
    if own is not None:
        query["user"] = own
    return exchange.respond_with(await exchange.service.history.requests(query), ())


# -- what is relayed


async def answer_by_model(exchange: Exchange) -> Response:
    """Relays a request whose model tells where to."""
    exchange.is_read_for_model = exchange.endpoint.path not in COUNTING_PATHS
    body = await exchange.read_body(required=True)
    return await relay_by_model(exchange, body)


async def answer_chat(exchange: Exchange) -> Response:
    """Relays a chat by its model; a GET asks for what is stored."""
    return await (answer_by_model(exchange) if exchange.request.method == "POST" else answer_any(exchange))


async def answer_any(exchange: Exchange) -> Response:
    """Relays any other request: by its model if it is JSON or a form that has one, else to the first provider."""
    kind, by_model = media_type(exchange.request.fields), exchange.endpoint.by_model
    if kind == FORM_TYPE and not by_model:
        return await answer_form(exchange)
    if not (by_model or kind in READ_TYPES or kind.endswith("+json")):
        return await answer_first_provider(exchange)
    body = await exchange.read_body(required=False)
    if body.facts:
        return await relay_by_model(exchange, body)
    if by_model and body.size and body.problem[1] == "not_json":
        raise BadRequest(*body.problem)
    return await relay_to_first(exchange, body)


async def answer_form(exchange: Exchange) -> Response:
    """Relays a form as it comes: by its model where that stands before its file, else to the first provider."""
    body = exchange.open_upload()
    form = await exchange.read_form(body)
    if not form.model:
        body.watch = functools.partial(note_late_model, exchange, body, exchange.form_walk(anywhere=True))
        body.watch(body.begun)
        return await relay_to_first(exchange, body)
    exchange.record.model = form.model
    exchange.check_model(BodyFacts(form.model, form.is_ambiguous, ""))
    body.watch = functools.partial(watch_form, form, body, exchange.caller if exchange.is_restricted() else None)
    body.watch(body.begun[form.seen :])
    targets = exchange.targets_of(form.model)
    exchange.count()
    candidates = exchange.service.relay.keys.order(targets, exchange.record.caller, exchange.loop.now)
    return await relay(exchange, body, candidates)


def watch_form(form: FormWalk, body: RequestBody, restricted: Optional[Caller], piece: bytes) -> None:
    """Looks at what follows in a form: of fields of one name, some servers take the last. Where its sender may use some
    models only, nothing that may name another one goes upstream. Raises Forbidden and BadRequest."""
    form.feed(piece)
    if body.has_come:
        form.finish()
    if form.is_ambiguous and restricted:
        raise hidden_model(restricted)
    if form.is_repeated:
        raise BadRequest("model: given more than once")


def note_late_model(exchange: Exchange, body: RequestBody, form: FormWalk, piece: bytes) -> None:
    """Looks for the model of a form behind its file: too late to be routed by, but it tells what is used. Of several, a
    server may take the first or the last."""
    try:
        form.feed(piece)
    except BadRequest:
        body.watch = None  # the provider will say what it makes of it
    if form.model:
        exchange.record.model = exchange.record.sent_model = form.model
        exchange.record.other_model = form.last
        exchange.uses_model = True


async def answer_first_provider(exchange: Exchange) -> Response:
    """Relays what belongs to one account at a provider: files, batches, the list of models."""
    return await relay_to_first(exchange, exchange.open_upload())


# By which Claude Code, Codex and opencode tell their sessions apart.
SESSION_HEADERS = ("x-claude-code-session-id", "session-id", "x-session-affinity")


async def relay_by_model(exchange: Exchange, body: ReadBody) -> Response:
    """Relays to the targets of the model. Raises Forbidden, NotFound, Unavailable and RateLimited."""
    assert body.facts
    asked = exchange.record.model = body.facts.model
    exchange.check_model(body.facts)
    targets = exchange.targets_of(asked)
    format = exchange.format
    if all(target.model == asked and target.provider.format == format for target in targets):
        exchange.release_room(body.drop_decoded())
    else:
        body.locate_model()
        await exchange.catch_up(body)
        if body.problem[0]:  # the one thing that `json` takes and a walk doesn't: a number of thousands of digits
            raise BadRequest(*body.problem)
    exchange.count()
    fields = exchange.request.fields
    named = next((fields.get(name) for name in SESSION_HEADERS if name in fields), "")
    session = named or body.facts.session or exchange.record.caller
    if is_within(exchange.endpoint.path, MAKING_PATHS):
        candidates = as_listed(targets)[:1]
    else:
        is_aside = exchange.endpoint.path in COUNTING_PATHS
        candidates = exchange.service.relay.keys.order(targets, session, exchange.loop.now, is_aside)
    if exchange.endpoint.path == COUNTING_PATH:
        if candidates[0].target.provider.chat_format != format:
            return await estimated_count(exchange, body, candidates[0].target)
        candidates = [it for it in candidates if it.target.provider.chat_format == format]
    return await relay(exchange, body, candidates)


async def relay_to_first(exchange: Exchange, body: Body) -> Response:
    """Relays to the first provider's first key. Raises Forbidden for users who may use some models only, where
    models may stand out of sight."""
    exchange.check_may_call()
    provider = first_provider(exchange.config, exchange.format)
    method, path = exchange.request.method, exchange.endpoint.path
    names_model = method in ("POST", "PUT", "PATCH") or exchange.request.body_length != 0
    names_model = names_model and not (method == "POST" and path == "/files")
    if exchange.is_restricted() and names_model:
        raise hidden_model(exchange.caller)
    if names_model:
        may_cost = not path.endswith("/cancel")
        exchange.record.other_model = exchange.record.other_model or exchange.model_beside
        exchange.count(may_cost=may_cost)
        # Servers have models of their own for such as pictures, or read one that isn't seen here; the answer tells its
        # name. What is stored tells its usage once more, but for conversations, which go on here at Mistral. Where a
        # model usually decides, as for vLLM's batches of chats, nothing is stored.
        is_told_again = path.startswith(SEARCHED_PATHS) and not path.startswith("/conversations/")
        exchange.may_tell_usage = may_cost and (exchange.endpoint.by_model or not is_told_again)
        exchange.record.usage.seeks_model = exchange.may_tell_usage
    elif unquote(path).startswith(DEFERRED_PATHS):
        exchange.may_tell_usage = exchange.record.usage.seeks_model = True
    searches = method in ("GET", "HEAD", "DELETE") and path.startswith((*SEARCHED_PATHS, *DEFERRED_PATHS))
    everywhere = [provider]
    if searches and provider.format != "echo":
        everywhere = [other for other in exchange.config.providers.values() if other.format == provider.format]
    candidates = as_listed(for_one_credential([Target(other, "") for other in everywhere if other.usable]))
    return await relay(exchange, body, candidates if searches else candidates[:1], searches)


def as_listed(targets: Iterable[Target]) -> list[Candidate]:
    """The candidates of the targets with their keys in the file's order, whatever cools."""
    return [Candidate(target, key) for target in targets for key in target.provider.keys or (None,)]


async def relay(exchange: Exchange, body: Body, candidates: Sequence[Candidate], searches: bool = False) -> Response:
    """The response of the first candidate that doesn't fail; for what creates something, only one is tried."""
    candidates = candidates[:1] if exchange.endpoint.creates else candidates
    relayed = await exchange.service.relay.obtain(upstream_request(exchange, body, candidates, searches))
    if relayed.candidate.target.provider.format == "echo":  # which holds as much as long as its response lasts
        exchange.drop_body()
    else:
        exchange.let_go()
    exchange.record.upstream_id = relayed.request_id[:LOGGED_CHARACTERS]
    if relayed.translated:
        return await translated_response(exchange, relayed, relayed.translated)
    if relayed.head.status >= 400:
        exchange.record.error = upstream_error(relayed.readable)
    try:
        fields, rewriter = relayed_fields(exchange, relayed), url_rewriter(exchange, relayed)
        return Response(relayed.head.status, relayed.reason, fields, relayed=relayed, rewriter=rewriter)
    except BaseException:
        relayed.release(exchange.service.relay.connections)
        raise


def upstream_request(
    exchange: Exchange, body: Body, candidates: Sequence[Candidate], searches: bool
) -> UpstreamRequest:
    """The request as it is relayed. Raises Unauthenticated."""
    request, endpoint = exchange.request, exchange.endpoint
    if "x-monorelay-key" not in request.fields or shows_token_twice(request.fields):
        candidates = without_client_keys(candidates)
    is_aside = endpoint.path in COUNTING_PATHS or endpoint.answer is answer_catalogue
    translate = None
    if isinstance(body, ReadBody) and request.method == "POST" and endpoint.path in TRANSLATED_PATHS:
        translate = TranslatedRequest(exchange, body).to
    return UpstreamRequest(
        request, endpoint.target(request.query), endpoint.by_model, body, candidates, exchange.record,
        searches=searches, translate=translate, is_aside=is_aside,
    )  # fmt: skip


def shows_token_twice(fields: Headers) -> bool:
    """Whether the relay's token stands in the place of the client's own credential, too: SDKs don't go without one."""
    credentials = fields.all("authorization") + fields.all("x-api-key")
    return any(value.rpartition(" ")[2] in fields.all("x-monorelay-key") for value in credentials)


def without_client_keys(candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    """The candidates that need no credential of the client's own. Raises Unauthenticated when there are none."""
    found = [candidate for candidate in candidates if not candidate.target.provider.client_keys]
    if found or not candidates:
        return found
    raise Unauthenticated(
        f"the provider {candidates[0].target.provider.name} takes your own key: send it as its own SDK does, and this "
        "relay's token in `x-monorelay-key`",
        "client_key_needed",
    )


def relayed_fields(exchange: Exchange, relayed: UpstreamResponse) -> Pairs:
    """The header fields of a provider's response that are passed on, and those that the relay adds."""
    target, cors = relayed.candidate.target, exchange.cors(relayed.head.fields.pairs)
    kept_back = RESPONSE_HEADERS_KEPT_BACK | HOST_HEADERS if cors else RESPONSE_HEADERS_KEPT_BACK
    if relayed.head.status == 304:  # curl follows a location there, too, and shows it the relay's token
        kept_back = kept_back | {"location"}
    fields = end_to_end(relayed.head.fields, kept_back)
    if relayed.shows_key("\n".join(itertools.chain.from_iterable(fields))):
        fields = [pair for pair in fields if not relayed.shows_key(": ".join(pair))]
    fields.append(("x-monorelay-provider", header_text(target.provider.name)))
    if target.model:
        fields.append(("x-monorelay-model", header_text(target.model)))
    fields.append(("x-monorelay-attempts", str(exchange.record.attempts)))
    fields.append(("x-monorelay-request-id", exchange.record.request_id))
    return fields + cors


def url_rewriter(exchange: Exchange, relayed: UpstreamResponse) -> Optional[UrlRewriter]:
    """The filter that makes the URLs of a batch, or a video, lead to the relay; None where there can be none. Raises
    UpstreamFailed for one in a content-encoding."""
    request, provider = exchange.request, relayed.candidate.target.provider
    if not exchange.endpoint.is_followed or provider.format == "echo" or relayed.head.status >= 300:
        return None
    if media_type(relayed.head.fields) != "application/json" or request.method == "HEAD":
        return None
    if relayed.coding:
        coding = header_text(relayed.coding[:100])
        message = f"the provider {provider.name} sent its answer as {coding} unasked; its URLs can't be checked"
        raise UpstreamFailed(message, "upstream_broken")
    server = exchange.config.server
    scheme = "https" if request.fields.get("x-forwarded-proto", "").lower() == "https" else "http"
    return UrlRewriter(provider, f"{scheme}://{request.fields.get('host') or f'{server.host}:{server.port}'}")


# -- what is translated on the way

# What may go to a provider of the other format, behind /v1.
TRANSLATED_PATHS = frozenset({"/messages", COUNTING_PATH, "/chat/completions"})
# Header fields of a client's that make sense to any provider: who it is, and by what to find its request.
TRANSLATED_HEADERS = {
    "user-agent", "x-request-id", "traceparent", "tracestate", "baggage", "b3", "x-cloud-trace-context",
    "x-amzn-trace-id",
}  # fmt: skip
# What the body of a response is, which a translation changes.
BODY_HEADERS = frozenset(
    {"content-type", "content-length", "content-encoding", "content-md5", "etag", "digest", "repr-digest"}
)


class TranslatedRequest:
    """A request as targets of the other format get it, made when the first key of one is tried."""

    def __init__(self, exchange: Exchange, body: ReadBody) -> None:
        self._exchange = exchange
        self._body = body
        self._target: Optional[Target] = None  # the one it was made for last,
        self._made: Union[UpstreamRequest, BadRequest, None] = None  # and what came of it
        self._size = 0

    async def to(self, target: Target, is_last: bool) -> Optional[UpstreamRequest]:
        """The request for a target, of which the body as it came is let go if this is the last one; None for one of the
        client's own format. Raises BadRequest, and Unavailable when there is no room for it."""
        if target.provider.chat_format == self._exchange.format:
            return None
        if target != self._target:
            if self._target:  # which may just have refused it: one after the other, that takes long
                await checkpoint(self._exchange.loop)
            self._exchange.release_room(self._size)
            self._target, self._made, self._size = target, None, 0
            try:
                self._made = await self._make(target, is_last)
            except BadRequest as error:
                # What led to it would keep all that was read of the body, while another target takes its time.
                self._made, error.__context__ = error.with_traceback(None), None
            if is_last:
                self._exchange.let_go(but=self._size)
        if not isinstance(self._made, UpstreamRequest):
            assert self._made
            raise self._made
        return self._made

    async def _make(self, target: Target, is_last: bool) -> UpstreamRequest:
        exchange = self._exchange
        asked, request = exchange.record.model, exchange.request
        content, values, made_at = self._body.content, self._body.values, time.time()
        content = content if is_last else [*content]  # of which the pieces are taken

        def work() -> Translated:
            return translate_request(content, values, target, asked, exchange.record.request_id, made_at)

        made = await at_leisure(exchange, self._body.size, work, self._body.most_values)
        self._size = sum(map(len, made.body))
        exchange.hold(self._size)
        fields = [pair for pair in request.fields.pairs if pair[0].lower() in TRANSLATED_HEADERS]
        fields += [("Content-Type", "application/json"), *client_credential(request, target.provider)]
        body = ReadBody()
        body.content += made.body
        head = RequestHead("POST", request.path, "", 1, Headers(fields), self._size)
        return UpstreamRequest(head, made.path, True, body, (), exchange.record, translated=made._replace(body=[]))


def client_credential(request: RequestHead, provider: Provider) -> Pairs:
    """The client's own credential, where the provider takes that, as servers of its format read it."""
    given = request.fields.all("x-api-key") + request.fields.all("authorization")
    if not provider.client_keys or not given:
        return []
    credential = given[0].rpartition(" ")[2]
    is_bearer = provider.auth_header == "authorization"
    named = ("Authorization", f"Bearer {credential}") if is_bearer else ("x-api-key", credential)
    return [named, *(("x-monorelay-key", token) for token in request.fields.all("x-monorelay-key"))]


async def at_leisure(exchange: Exchange, size: int, work: Callable[[], Result], values: int = 0) -> Result:
    """What work() returns for a body of this size, with so many values at most: called in a thread if that may take
    long, in the caller's turn. Nobody waits for what takes far longer than his own."""
    loop = exchange.loop
    if size <= TRANSLATED_AT_ONCE_BYTES:
        return work()
    if size <= TRANSLATED_SOON_BYTES and values <= TRANSLATED_SOON_VALUES:
        worker = loop.worker
    else:
        is_late = size > TRANSLATED_LATE_BYTES or values > TRANSLATED_LATE_VALUES
        worker = loop.late_worker if is_late else loop.long_worker
    return await in_thread(loop, work, worker)


async def estimated_count(exchange: Exchange, body: ReadBody, target: Target) -> Response:
    """How many tokens a request has that would be translated for its target: an estimate of the relay's own. Raises
    BadRequest."""
    content, values, record = body.content, body.values, exchange.record
    record.provider, record.sent_model = target.provider.name, target.model

    def work() -> int:
        try:
            return estimated_tokens(read_document(content, values))
        except RecursionError:
            raise BadRequest("the body is nested too deeply to be counted") from None

    tokens = await at_leisure(exchange, body.size, work, body.most_values)
    fields = [
        ("x-monorelay-provider", header_text(target.provider.name)),
        ("x-monorelay-model", header_text(target.model)),
        ("x-monorelay-estimated", "true"),
    ]
    return exchange.respond(200, {"input_tokens": tokens}, fields)


async def translated_response(exchange: Exchange, relayed: UpstreamResponse, translated: Translated) -> Response:
    """The response to a translated request, in the client's format. Raises Unavailable."""
    record, asked = exchange.record, translated.asked
    record.translated = f"{asked.format}>{relayed.candidate.target.provider.chat_format}"
    record.dropped = ", ".join(translated.dropped)
    failed = False
    told = functools.partial(translated_fields, exchange, relayed)  # not before the body is there: they may be many
    tells_error = relayed.head.status >= 400 or relayed.begins_with_error
    translator = AnswerTranslator(asked, functools.partial(presented_fault, relayed))
    if asked.stream and relayed.is_stream and not tells_error:
        fields = [*told(), ("content-type", "text/event-stream")]
        return Response(200, reason_of(200), fields, relayed=relayed, translator=translator)
    try:
        if tells_error:
            record.error = upstream_error(relayed.readable)
            fault = relayed.first_fault or fault_of_status(relayed.head.status, relayed.readable, asked.provider)
            return fault_response(fault, asked, told())
        body = await whole_body(exchange, relayed)
        if relayed.coding:
            body = await decompressed(exchange, body, relayed.coding, asked.provider)
        body = KeyEraser(relayed.erased).feed(body, is_last=True)
        # Some servers call a stream JSON, or plain text.
        is_stream = relayed.is_stream or BEGINS_EVENT.match(body, 0, PEEKED_BYTES) is not None
        await read_usage(exchange, body, is_stream)
        answer = await at_leisure(exchange, len(body), functools.partial(translator.whole, body, is_stream))
        exchange.hold(len(answer))
        fields = [*told(), ("content-type", "text/event-stream" if asked.stream else "application/json")]
        return Response(200, reason_of(200), fields, answer)
    except AnswerFault as fault:
        failed = not fault.is_about_request
        if not fault.text:
            return untold_answer(exchange, UpstreamFailed(fault.message, fault.code))
        record.error = "upstream:error"
        return fault_response(fault, asked, told())
    except (UpstreamFailed, UpstreamSilent) as error:
        failed = True
        return untold_answer(exchange, error)
    finally:
        exchange.service.relay.finish(relayed, failed)


def fault_response(fault: AnswerFault, asked: Asked, fields: Pairs) -> Response:
    """A provider's error in the client's format; its status stays, but where clients act by another one."""
    status, kind, message, code = error_terms(asked, fault)
    body = error_body(asked.format, kind, message, code, asked.id)
    return Response(status, reason_of(status), [*fields, ("content-type", "application/json")], body)


def untold_answer(exchange: Exchange, error: RelayError) -> Response:
    """The response in place of a provider's answer that broke off or can't be translated."""
    response = exchange.error_response(error)
    return response._replace(fields=response.fields + translation_fields(exchange.record))


def translated_fields(exchange: Exchange, relayed: UpstreamResponse) -> Pairs:
    """The header fields of a translated response."""
    fields = [pair for pair in relayed_fields(exchange, relayed) if pair[0].lower() not in BODY_HEADERS]
    record, names = exchange.record, {name.lower() for name, _ in fields}
    fields += [(name, record.request_id) for name in ("request-id", "x-request-id") if name not in names]
    return fields + translation_fields(record)


def translation_fields(record: AccessRecord) -> Pairs:
    """The header fields that tell of a translation."""
    dropped = [("x-monorelay-dropped", header_text(record.dropped))] if record.dropped else []
    return [("x-monorelay-translated", record.translated), *dropped]


async def read_usage(exchange: Exchange, body: bytes, is_stream: bool) -> None:
    """Looks for the usage in a whole body, in parts: one that is full of such objects takes 0.3 s."""
    usage, rest = exchange.record.usage, memoryview(body)
    try:
        while len(rest) > RECEIVE_BYTES:
            usage.read(bytes(rest[:RECEIVE_BYTES]), is_stream)
            rest = rest[RECEIVE_BYTES:]
            await checkpoint(exchange.loop)
    finally:
        # Of one whose client leaves meanwhile, too; there is no time for more than its end, where the usage stands.
        usage.read(bytes(rest[-RECEIVE_BYTES:]), is_stream)


async def whole_body(exchange: Exchange, relayed: UpstreamResponse) -> bytes:
    """The whole body of a response that is to be translated. Raises UpstreamFailed, UpstreamSilent, Unavailable, and
    UnfitAnswer for one that is too long: requests can bring that about, for pictures."""
    body, limit = bytearray(), min(exchange.body_limit, TRANSLATED_ANSWER_BYTES)
    piece = relayed.take_content()
    provider = relayed.candidate.target.provider.name
    try:
        while True:
            exchange.hold(len(piece))
            body += piece
            if len(body) > limit:
                raise UnfitAnswer(f"the answer of the provider {provider} is over {limit} bytes")
            if relayed.decoder.finished:
                return bytes(body)
            piece = await absorb_more(exchange.loop, relayed)
            relayed.take_content()
    except NoResponse as error:
        raise UpstreamSilent(str(error)) from None
    except (BrokenExchange, FramingError):
        if relayed.ends_with_connection:
            return bytes(body)
        raise UpstreamFailed(f"the provider {provider} broke off its answer", "upstream_broken") from None


async def decompressed(exchange: Exchange, body: bytes, coding: str, provider: str) -> bytes:
    """A whole body without the coding that its provider wasn't asked for. Raises AnswerFault, and Unavailable."""
    content, before = bytearray(), 0
    pieces = (body[at : at + RECEIVE_BYTES] for at in range(0, len(body), RECEIVE_BYTES))
    try:
        inflater = Inflater(pieces, coding)
        while not inflater.finished and len(content) <= TRANSLATED_ANSWER_BYTES:
            content += inflater.go_on()
            exchange.hold(len(content) - before)
            before = len(content)
            await checkpoint(exchange.loop)
    except (BadRequest, UnsupportedCoding):
        coding = header_text(coding[:100])
        raise AnswerFault(f"the provider {provider} sent its answer as {coding} unasked; it can't be read") from None
    if not inflater.finished:
        raise UnfitAnswer(f"the answer of the provider {provider} is over {TRANSLATED_ANSWER_BYTES} bytes")
    return bytes(content)


# -- what stands where


READING, SENDING = ("GET", "HEAD"), ("POST",)
ENDPOINTS: Mapping[str, Endpoint] = {
    "/": Endpoint(answer_root, READING, open=True),
    "/dashboard": Endpoint(answer_dashboard, READING, open=True),
    "/metrics": Endpoint(answer_metrics, READING),
    "/api/live": Endpoint(answer_live, ("GET",)),
    "/api/usage": Endpoint(answer_usage, READING),
    "/api/requests": Endpoint(answer_requests, READING),
    "/api/hello": Endpoint(answer_alive, ("HEAD",), open=True),
    "/health": Endpoint(answer_health, READING, open=True),
    "/api/auth/login": Endpoint(answer_login, SENDING, open=True),
    "/api/auth/refresh": Endpoint(answer_refresh, SENDING, open=True),
    "/api/auth/me": Endpoint(answer_me, READING),
    "/api/event_logging/batch": Endpoint(answer_telemetry, SENDING),
    "/v1/messages": Endpoint(answer_by_model, SENDING, "/messages", by_model=True),
    "/v1/messages/beta": Endpoint(answer_by_model, SENDING, "/messages", by_model=True, beta=True),
    "/v1/messages/count_tokens": Endpoint(answer_by_model, SENDING, COUNTING_PATH, by_model=True),
    "/v1/anthropic/models": Endpoint(answer_first_provider, READING, "/models"),
    "/v1/models": Endpoint(answer_catalogue, READING, "/models"),
    "/v1/chat/completions": Endpoint(answer_chat, ("POST", "GET"), "/chat/completions", by_model=True),
    "/v1/completions": Endpoint(answer_by_model, SENDING, "/completions", by_model=True),
    "/v1/responses": Endpoint(answer_by_model, SENDING, "/responses", by_model=True),
    "/v1/embeddings": Endpoint(answer_by_model, SENDING, "/embeddings", by_model=True),
}
PAGE_PATHS = frozenset({"/dashboard", "/metrics", "/api/live", "/api/usage", "/api/requests"})  # not for other origins
# Where the top-level `model` of a JSON body is what decides which model works, and nothing is created.
OTHER_MODEL_PATHS = frozenset({
    "/v1/audio/speech", "/v1/chat/completions/batch", "/v1/decisions", "/v1/images/generations", "/v1/moderations",
    "/v1/responses/compact", "/v1/responses/input_tokens",
})  # fmt: skip


def format_of(path: str, names_version: bool) -> str:
    """The format of a request; `names_version`: it has an anthropic-version. The first TELLING_PATH_CHARACTERS of its
    path are enough."""
    path = known_form(path)
    if path == "/v1/messages" or path.startswith(("/v1/messages/", "/v1/anthropic/")):
        return "anthropic"
    by_model = path in ENDPOINTS and ENDPOINTS[path].by_model
    return "anthropic" if names_version and not by_model else "openai"


def likely_format(data: bytes) -> str:
    """The format of a request whose head can't be read, or hasn't been."""
    anthropic = re.match(rb"\S{1,20} /v1/(?:messages|anthropic/)", data) or b"\nanthropic-version:" in data.lower()
    return "anthropic" if anthropic else "openai"


def likely_origin(data: bytes) -> Headers:
    """The origin in a head that can't be read, if there is one; none for the page, which is for no other origin."""
    path = re.match(rb"\S{1,20} ([^ ?]{1,200})", data)
    origin = re.search(rb"(?i)\norigin: ?([!-~]{1,200})", data)
    if not origin or (path and known_form(path[1].decode("latin-1")) in PAGE_PATHS):
        return Headers([])
    return Headers([("origin", origin[1].decode("ascii"))])


def find_endpoint(method: str, path: str, format: str) -> Endpoint:
    """The endpoint of a request. Raises NotFound, BadRequest and MethodNotAllowed."""
    endpoint = ENDPOINTS.get(path) or other_endpoint(method, path, format)
    if method not in endpoint.methods:
        error = MethodNotAllowed(method[:20], header_text(path[:200]), endpoint.methods)
        error.close = method not in METHODS  # what comes behind CONNECT is no request
        raise error
    return endpoint


def other_endpoint(method: str, path: str, format: str) -> Endpoint:
    """What serves a path that isn't listed, or is in another spelling. Raises NotFound and BadRequest."""
    if path.count("%") > PATH_ESCAPES:
        raise NotFound(f"the path has more than {PATH_ESCAPES} percent-encoded characters")
    known = known_form(path)
    if method not in METHODS:
        return ENDPOINTS.get(known) or Endpoint(answer_any, METHODS)
    if not is_safe_path(path):
        raise NotFound("the path has empty, . or .. segments, a backslash, spaces or control characters")
    if known in ENDPOINTS:
        return ENDPOINTS[known]
    if known.startswith("/v1/anthropic/models/"):
        return Endpoint(answer_first_provider, READING, known[len("/v1/anthropic") :])
    check_base_url(known)
    if not known.startswith("/v1/") or known.startswith("/v1/anthropic/"):
        raise NotFound(f"there is nothing at {header_text(known[:200])}")
    if known.startswith("/v1/models/") and method in READING:
        return Endpoint(answer_catalogue, READING, known[len("/v1") :])
    is_stored = is_within(known, STORED_PATHS)
    decoded = re.sub("(?i)%2f", "/", known)  # as some servers read it
    return Endpoint(
        answer_first_provider if is_stored and format == "anthropic" else answer_any,
        METHODS,
        (known if is_stored else unreserved(path))[len("/v1") :],
        by_model=known in OTHER_MODEL_PATHS,
        creates=is_within(decoded, CREATING_PATHS),
        is_followed=is_within(known, FOLLOWED_PATHS),
    )


def check_base_url(path: str) -> None:
    """Raises BadRequest for a path that shows what is wrong with a client's base_url: of a 404, Claude Code tells only
    that the model may not exist."""
    if is_within(path, "/v1/v1/"):
        raise BadRequest("the path begins with /v1/v1: leave /v1 out of the client's base_url", "doubled_v1")
    if f"/v1{path}" in ENDPOINTS:
        raise BadRequest(f"there is nothing at {path}: the client's base_url must end in /v1", "wrong_base_url")
    for prefix in ("/anthropic", "/openai", "/api"):
        if is_within(path, f"{prefix}/v1/"):
            raise BadRequest(f"there is nothing at {prefix}: leave it out of the client's base_url", "wrong_base_url")


def is_within(path: str, places: Union[str, tuple[str, ...]]) -> bool:
    """Whether the path is one of the places, each of which ends in /, or stands below one."""
    return f"{path}/".startswith(places)


def known_form(path: str) -> str:
    """The path as the rules here name it: its letters not escaped, and without the one / at its end that is ignored."""
    path = unreserved(path)
    return path[:-1] if path.endswith("/") and path != "/" else path


def unreserved(path: str) -> str:
    """The path with the characters not escaped that need not be: both spellings are one path (RFC 3986 §6.2.2.2)."""
    return re.sub(UNRESERVED_ESCAPED, lambda match: chr(int(match[1], 16)), path) if "%" in path else path


# ==== Handler ====================================================================================
#
# A connection of a client, and no more than that: it waits for heads, has each request answered, sends the response,
# and closes in such a way that what it has sent is read. RelayServer makes one for each connection that it accepts, as
# http.server has it; the request protocol of BaseHTTPRequestHandler itself, which needs a thread for each connection
# and is lenient where RFC 9112 is strict, is not used.


TLS_HELLO = b"\x16\x03"  # how a TLS client begins (RFC 8446 §5.1)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves one connection: request after request, as a task of the event loop."""

    server: "RelayServer"

    def setup(self) -> None:
        """Prepares to serve a connection that was just accepted; called in the thread that accepts."""
        self.service = self.server.service
        self.loop = self.service.loop
        self.network = network_of(str(self.client_address[0]), TURN_BITS)  # of the client, see origin_of()
        self.over_limit = False  # beyond max_connections: it gets one response, which says so
        self.known = False  # whether it has shown a valid token
        self.user = ""  # who has shown the last one; empty for the owner
        self.idle = False  # between two requests
        self.lingering = False  # behind the last one
        self.evicted = False  # to make room for others
        self.busy = False  # with a request that isn't answered yet
        self.record: Optional[AccessRecord] = None  # of the last request
        self.unread = b""  # the head that has come, until it is read: its body may take long, and needs no copy
        self.fault: Optional[RelayError] = None  # why no head can come any more
        self.task: Optional[Task] = None
        self.server.handlers[self] = None  # once it has all that other threads ask it for

    def handle(self) -> None:
        """Has the event loop begin the connection's task."""
        try:
            self.loop.post(self._arrive)
        except MemoryError:  # nobody else would close it
            self._give_up()

    def _arrive(self) -> None:
        """Queues it: nobody waits for thousands of new connections of another address."""
        try:
            self.loop.arrived.put(self._begin, self.network)
        except MemoryError:  # nobody else would close it
            self._give_up()

    def _begin(self) -> None:
        try:
            self.loop.start(self._serve(), self.network)
        except MemoryError:  # nobody else would close it
            self._give_up()

    def _give_up(self) -> None:
        self.server.release(self)
        self.request.close()

    def finish(self) -> None:
        """Does nothing, where socketserver would close: the event loop serves the connection from now on."""

    @property
    def answering(self) -> bool:
        """Whether a request isn't answered yet, or its response isn't all sent."""
        return self.busy or (self.task is not None and self.channel.is_sending)

    def may_be_closed(self) -> bool:
        """Whether nothing would be lost: the last response is sent, and no other request has begun to come."""
        if self.lingering:
            return True
        if not self.idle or self.channel.received or self.channel.is_sending:
            return False
        try:  # what has come stays there for its own event, which waits for its turn
            return not self.request.recv(1, socket.MSG_PEEK)
        except (OSError, MemoryError):
            return True

    def close_if_idle(self) -> None:
        """Closes the connection unless a request has come, which then gets its response."""
        if not self.task or not self.idle:
            return
        if self.may_be_closed():
            self.task.cancel()
        else:
            self.channel.receive()
            self.loop.post(self.task.resume)  # not in its turn: the loop may end before that

    async def _serve(self) -> None:
        """Serves request after request, and closes the connection in the end."""
        try:
            self.channel = Channel(self.request, self.loop, UNKNOWN_HELD_BYTES)
        except (OSError, MemoryError):  # the system watches no more sockets
            self._give_up()
            return
        self.task = self.loop.current
        self.task.client = self.channel
        try:
            self.over_limit = not self.server.admit(self)
            while True:
                self.unread = await self._next_head()
                if not self.unread or not await self._serve_request():
                    await self._linger()
                    break
                if self.channel.received:  # one who sends many requests at once waits for the others' turn
                    await checkpoint(self.loop, self.loop.greedy)
        except ClientGone:
            pass
        finally:
            self.server.release(self)
            self.channel.close()

    async def _next_head(self) -> bytes:
        """The head of the next request, or what can't become one; empty when none has come for too long."""
        channel = self.channel
        deadline = self.loop.now + (OVER_LIMIT_SECONDS if self.over_limit else IDLE_SECONDS)
        seen, begun = 0, False
        try:
            while True:
                if channel.received:
                    if seen < 2 and channel.received.startswith(b"\r\n"):
                        channel.take(2)  # RFC 9112 §2.2: an empty line before it is ignored
                        seen = 0
                    size = head_length(channel.received, seen)
                    if size:
                        if not self.known:  # what comes behind a long head gets no more room for that
                            channel.set_window(UNKNOWN_HELD_BYTES)
                        return channel.take(size)
                    seen = len(channel.received)
                    if seen and not begun:
                        begun, deadline = True, (deadline if self.over_limit else self.loop.now + HEAD_SECONDS)
                        self.be_busy()
                        self._check_share()
                    if channel.is_full:
                        channel.set_window(REQUEST_HEAD_BYTES + 1)
                else:
                    self._be_idle()
                await until(deadline)
        except (MalformedRequest, Unavailable) as fault:
            self.fault = fault
        except Overdue:
            self.fault = MalformedRequest(f"the head took more than {HEAD_SECONDS:.0f} seconds", 408)
        finally:
            self.be_busy()
        return channel.take_all()

    def _be_idle(self) -> None:
        """Notes that the connection may be closed."""
        self.idle = True
        self.server.unproven.pop(self, None)
        if not self.over_limit:
            self.server.idle.setdefault(self, self.loop.now)  # a wake for nothing changes no order

    def be_busy(self) -> None:
        """Notes that a request has begun to come, or that the last response isn't taken."""
        self.idle = False
        self.server.idle.pop(self, None)
        if not (self.known or self.over_limit):
            self.server.unproven.setdefault(self, self.loop.now)

    async def _serve_request(self) -> bool:
        """Answers the request whose head has come; whether the connection can be used for another one."""
        self.busy = True
        exchange = Exchange(self.service, self.channel, str(self.client_address[0]))
        self.record = exchange.record
        self.service.running[exchange] = None
        try:
            return await self._send(exchange, await self._respond(exchange))
        except (ClientGone, GeneratorExit):
            exchange.record.complete = False
            exchange.record.error = exchange.record.error or ("made_room" if self.evicted else "client_gone")
            raise
        except Exception as error:
            self._warn_of_defect(error, exchange)
            raise ClientGone from None  # the response has begun, and can only be broken off
        finally:
            self.busy = False
            exchange.let_go()
            self.service.conclude(exchange)

    async def _respond(self, exchange: Exchange) -> Response:
        """The response of the endpoint, or the error that stands in its way: the one place where errors become HTTP."""
        try:
            if self._has_sent_much():
                await checkpoint(self.loop)  # many clients may do so at one moment
            self._read_head(exchange)
            self._admit()
            try:
                answer = await self._find_answer(exchange)
            except RelayError:  # its client may not take what refuses the request, either
                self._check_share()
                raise
            self._check_share()
            return await answer(exchange)
        except RelayError as error:
            # An error that is kept to be raised again would keep, by its traceback, all frames that led to it.
            return exchange.error_response(error.with_traceback(None))
        except (ClientGone, Overdue):
            raise
        except Exception as error:
            self._warn_of_defect(error, exchange)
            return exchange.error_response(RelayError("an internal error; the relay's log has its place"))

    def _has_sent_much(self) -> bool:
        """Whether the head is long, or a client that hasn't shown a token has sent much behind it while others wait."""
        if self.known:
            return len(self.unread) > LONG_HEAD_BYTES
        sent = len(self.unread) + (len(self.channel.received) if any(self.loop.late) else 0)
        return sent > AT_ONCE_BYTES

    async def _find_answer(self, exchange: Exchange) -> Answerer:
        """What answers the request; if that needs a token, once the caller is known. Raises RelayError."""
        request = exchange.request
        if request.method == "OPTIONS" and exchange.cors():
            return answer_preflight
        if request.method in METHODS and asks_for_websocket(request.fields):
            raise NoWebSocket
        endpoint = exchange.endpoint = find_endpoint(request.method, request.path, exchange.format)
        if not endpoint.open:
            await self._authenticate(exchange)
        return endpoint.answer

    def _warn_of_defect(self, error: Exception, exchange: Exchange) -> None:
        self.service.log.warn(f"internal error: {describe(error)}, request {exchange.record.request_id}")

    def _read_head(self, exchange: Exchange) -> None:
        """Reads the head, strictly. Raises MalformedRequest, to be told in the format that the bytes look like."""
        data, self.unread = self.unread, b""
        try:
            if self.fault:
                raise self.fault
            head = exchange.head = exchange.request = parse_request_head(data)
        except MalformedRequest as fault:
            exchange.format = likely_format(data)
            fault.headers += cors_fields(exchange.config.server.cors_origins, likely_origin(data))
            if data.startswith(TLS_HELLO):
                self.server.warn_of_tls(exchange.address)
            raise
        record, path = exchange.record, head.path
        record.method, record.path = head.method[:LOGGED_CHARACTERS], path[:LOGGED_CHARACTERS]
        exchange.format = format_of(path[:TELLING_PATH_CHARACTERS], "anthropic-version" in head.fields)

    def _admit(self) -> None:
        """Raises Unavailable while the relay has too many connections, or shuts down."""
        if self.over_limit:
            raise Unavailable(
                "this relay serves as many connections as it may (server.max_connections, and half of `ulimit -n`)",
                "too_many_connections",
            )
        if self.service.draining:
            raise shutting_down()

    async def _authenticate(self, exchange: Exchange) -> None:
        """Finds out who calls, and goes on in the turns of that caller. Raises Unauthenticated."""
        record, task = exchange.record, self.loop.current
        exchange.caller = identify(shown_tokens(exchange.request.fields), exchange.config, record.when)
        record.caller = exchange.caller.name[:LOGGED_CHARACTERS]
        before, task.origin = task.origin, origin_of(exchange.caller, self.network)
        if task.origin != before and any(self.loop.late):  # a caller may come from many addresses
            await checkpoint(self.loop, self.loop.late.clients)
        if not self.known:  # only now: one that waits for its turn may make room for others
            self.known = True
            self.server.unproven.pop(self, None)
            self.channel.set_window(HELD_BYTES)
        self.user = "" if exchange.caller.admin else record.caller

    def _check_share(self) -> None:
        """Raises Unavailable for a user who has too many of the connections. Its client may not take the response: the
        connection may be closed to make room."""
        if self.user and self.server.exceeds_share(self.user):
            self.server.unproven[self] = self.loop.now
            message = f"the requests of {self.user} have as many connections as they may beside those of others"
            limits = "server.max_connections, and a quarter of `ulimit -n`"
            error = Unavailable(f"{message} ({limits}); try again", "too_many_connections")
            error.close = True
            raise error

    async def _send(self, exchange: Exchange, response: Response) -> bool:
        """Sends a response as it comes: the one place from which responses go to clients. Whether the connection can be
        used for another request. Raises ClientGone."""
        outgoing = Outgoing(response, exchange.head, exchange.format, exchange.record)
        try:
            keep_alive = await self._may_be_kept(exchange, response)
            data = outgoing.begin(keep_alive, self.loop.now)
            exchange.let_go_of_head()
            if outgoing.until_close:  # whatever happens, but for its proper end, must look like a break
                self.channel.abort_on_close(True)
            while True:
                begun = self.loop.now
                await self.channel.send(data, STALLED_CLIENT_SECONDS)
                outgoing.held_up += self.loop.now - begun
                if outgoing.ended:
                    break
                data = b""  # it may be long, and so may the wait for what follows
                data = await next_part(self.loop, outgoing, response)
            if outgoing.must_reset:
                await self.channel.send_rest()
                self.channel.close()
            elif outgoing.until_close:
                self.channel.abort_on_close(False)
        except Unavailable as error:
            exchange.record.error = error.code
            raise ClientGone from None
        except (OSError, Overdue, ClientGone):  # it has left, or takes nothing for too long
            self.channel.close()
            await exchange.read_left(response.relayed)
            raise ClientGone from None
        finally:
            if response.relayed:
                self.service.relay.finish(response.relayed, outgoing.failed, exchange.record.complete)
            elif response.live:
                response.live.close()
        return outgoing.keep_alive

    async def _may_be_kept(self, exchange: Exchange, response: Response) -> bool:
        """Whether the connection can be kept behind the response, as far as the request decides that."""
        head = exchange.head
        if response.close or not head or not head.keep_alive or self.service.draining or self.over_limit:
            return False
        return exchange.body_ended or (not response.relayed and await exchange.skip_body())

    async def _linger(self) -> None:
        """Closes our side at once, the rest when the client has read and closed, too. Closed outright, the
        response could be lost with what the client is still sending (RFC 9112 §9.6)."""
        try:
            await self.channel.finish_sending()
            self.lingering = True
            self._be_idle()
            latest = self.loop.now + (OVER_LIMIT_SECONDS if self.over_limit else LINGER_LONGEST_SECONDS)
            while True:
                self.channel.take_all()
                await until(min(self.loop.now + LINGER_SECONDS, latest))
        except (OSError, Overdue):
            pass


# ==== Server ========================================================================================
#
# Accepts connections, admits or refuses them, and ends in good order. Of http.server only the accepting is used.
#
#   accept         one thread for each address: it makes a Handler, which posts its task to the loop; so does a loop
#                  that is late
#   event loop     serves; all else belongs to it
#   log, ledger    write; what they are given waits in a deque, which several threads may use
#   worker         five kinds: names; steps of TLS; echo, translations and long errors; passwords; queries of the
#                  ledger. Each posts its result
#   operator       waits for signals and edits, replaces `service.routing` as a whole, and stops the server
#
# `handlers` is added to by the threads that accept, and else belongs to the loop; whoever else reads it takes a copy.
#
# Beyond max_connections a new connection makes another one go that has nothing to lose, or is let in only to be told
# so; far beyond, and without a descriptor, refuse() tells it without reading its request.


class RelayServer(http.server.ThreadingHTTPServer):
    """Listens, admits connections, and hands each to the event loop.

    For callers: start(), url, reload(), stop(). Everything else belongs to socketserver's protocol."""

    def __init__(
        self,
        config: Config,
        log: Optional[IO[str]] = None,
        listeners: Optional[Sequence[socket.socket]] = None,
        place: Optional["PlaceOnBoard"] = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(("", 0), Handler, bind_and_activate=False)
        self.socket.close()
        self._listeners = listeners or listen(config.server)
        self.socket = self._listeners[0]
        for listener in self._listeners:  # another process, or the queue's end, may be faster than accept()
            listener.setblocking(False)
        self.server_address = self.socket.getsockname()
        config = with_run_secrets(config, None)
        self.log = LogWriter(sys.stderr if log is None else log, config.server.log)
        self.service = Service(config, self.log, place, clock)
        self.handlers: dict[Handler, None] = {}  # of all connections; the thread that accepts adds to it
        self.service.connections = self.handlers
        self.service.loop.make_room = lambda: self.service.relay.connections.close() or self.make_room()
        self.service.loop.accept = self.accept_some
        self.served: dict[Handler, None] = {}  # those that max_connections admits
        # Of these, those between two requests or behind the last one; and those that are busy and haven't shown a
        # token, or are refused since their user has too many; each since when. Those for longest come first.
        self.idle: dict[Handler, float] = {}
        self.unproven: dict[Handler, float] = {}
        self.refused: dict[Handler, float] = {}  # those that aren't admitted, and are told so; each since when
        # Given up for a moment when there is no other descriptor left, to be able to refuse a connection.
        self._spare = io.FileIO(os.devnull)
        self._spare_lock = threading.Lock()  # guards the spare descriptor
        self._descriptors = descriptor_limit()
        self._accepting = True
        self._acceptors: list[threading.Thread] = []  # for the other addresses than the first
        self._refusal_logged = self._tls_logged = -math.inf
        self._started = False

    @property
    def url(self) -> str:
        """Where clients on this machine reach it."""
        host, port = self.server_address[:2]
        return relay_url(str(host), int(port))

    @property
    def connection_limit(self) -> int:
        """How many connections are served at a time: each may need one to a provider as well."""
        limit = min(self.service.config.server.max_connections, self._descriptors // 2)
        # select(), which is all there is on Windows, looks after 512 sockets: each client may need three.
        return min(limit, 150) if os.name == "nt" else limit

    def admit(self, handler: Handler) -> bool:
        """Whether a new connection is served: beyond max_connections another one has to make room."""
        if len(self.served) >= self.connection_limit and not self.make_room():
            self.refused[handler] = self.service.loop.now
            return False
        self.served[handler] = None
        return True

    def make_room(self) -> bool:
        """Closes the connection that has the least to lose; whether there was one that may be closed. One that has been
        idle for a moment only may be new, and its first request on the way."""
        now = self.service.loop.now
        times = now - UNPROVEN_SECONDS, now - UNPROVEN_LEAST_SECONDS
        self._end_refused(times[1])
        found = (find(latest) for latest in times for find in (self._idle_longest, self._unproven_longest))
        handler = next(filter(None, found), None) or self._idle_longest(now)
        if not handler or not handler.task:
            return False
        handler.task.cancel()
        return True

    def _idle_longest(self, latest: float) -> Optional[Handler]:
        """The connection that has been idle for longest, since `latest` or before; or one whose client takes no
        response, where its user has too many."""
        while self.idle:
            handler, since = next(iter(self.idle.items()))
            if since > latest:
                break
            if handler.may_be_closed():
                return handler
            handler.be_busy()  # its last response isn't taken, or a request has just come: it isn't looked at again
            takes_nothing = len(self.idle) < SHARES_AT_ONCE and handler.user and handler.answering
            if takes_nothing and self.exceeds_share(handler.user):
                with contextlib.suppress(OSError):
                    handler.channel.flush()  # it may only be put off until the end of a turn
                return handler
        return None

    def _unproven_longest(self, latest: float) -> Optional[Handler]:
        """The connection that has been busy for longest without having shown a token, since before `latest`."""
        handler = next(iter(self.unproven), None)
        if not handler or self.unproven[handler] >= latest:
            return None
        handler.evicted = True
        return handler

    def _end_refused(self, latest: float) -> None:
        """Closes one that was refused before `latest`, where too many wait for their requests, to be told so: others
        couldn't come in, whom room may be made for."""
        handler = next(iter(self.refused)) if len(self.refused) >= OVER_LIMIT_CONNECTIONS else None
        if handler and handler.task and self.refused[handler] < latest:
            handler.evicted = True
            handler.task.cancel()

    def exceeds_share(self, user: str) -> bool:
        """Whether a user, from wherever, has more than one connection at work, and over three quarters of those that
        nobody else has: others must find room."""
        at_work = len(self.served) - len(self.idle) - len(self.unproven)
        left = min(self.connection_limit, self._descriptors // 4) - at_work  # a request to echo takes three
        if at_work <= 3 * left:  # nor can those of one user be more
            return False
        own = sum(it.user == user and not it.idle for it in self.served)
        return own > max(1, 3 * left)

    def release(self, handler: Handler) -> None:
        """Forgets a connection that is closed."""
        self.handlers.pop(handler, None)
        self.served.pop(handler, None)
        self.refused.pop(handler, None)
        self.idle.pop(handler, None)
        self.unproven.pop(handler, None)

    def warn_of_tls(self, address: str) -> None:
        """Logs now and then that somebody speaks TLS to this port."""
        now = self.service.loop.now
        if now - self._tls_logged > WARNING_SECONDS:
            self._tls_logged = now
            self.log.warn(
                f"{address} speaks TLS to this port, which is plain HTTP: its base_url must begin with http://"
            )

    def start(self) -> None:
        """Starts its threads: one writes the log, one the ledger if any, one serves, one accepts at each address."""
        self.log.start()
        self.service.ledger.start()  # before the first request: it reads what users have spent
        serve_in_thread("event loop", self.service.loop.run)
        serve_in_thread("accept", self._accept_first)
        for listener in self._listeners[1:]:
            self._acceptors.append(serve_in_thread("accept more", functools.partial(self._accept_from, listener)))
        self._started = True

    def reload(self, config: Config, warns: bool = True) -> None:
        """Serves new requests by another configuration; those that run finish with the one they began with."""
        old, warn = self.service.config, self.log.warn if warns else (lambda message: None)
        config = with_run_secrets(config, old)
        made = config.run_secrets
        if made and config.server.access_keys == (made.access_key,) != old.server.access_keys:
            warn("relay.json has no credential any more; a restart makes up an access key, and shows it")
        for name in ("host", "port", "workers"):
            if getattr(config.server, name) != getattr(old.server, name):
                warn(f"server.{name} has changed, which takes effect with a restart")
        if config.ledger and not sqlite3:
            warn(NO_SQLITE)
        self.log.style = config.server.log
        self.service.use(config)

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Stops accepting, lets what runs finish for so long, cuts the rest, and closes."""
        clock = self.service.loop.clock
        deadline = clock() + drain_seconds
        if self._started:
            self.shutdown()  # which waits until serve_forever() has begun and ended
            self._accepting = False
            for thread in self._acceptors:
                thread.join()
            self._accept_rest()
        for listener in self._listeners:
            listener.close()
        self._run_in_loop(self._begin_draining)
        self._run_in_loop(lambda: None)  # behind all that it has posted
        while any(handler.answering for handler in list(self.handlers)) and clock() < deadline:
            time.sleep(0.02)
        self._run_in_loop(self._cut_all)
        self._spare.close()
        self.service.ledger.finish()
        self.log.finish()

    def running(self) -> list[AccessRecord]:
        """The requests that aren't answered yet, or whose responses aren't all sent."""
        return [handler.record for handler in list(self.handlers) if handler.record and handler.answering]

    def tell_of_cut(self) -> None:
        """Logs what is running, which the end of the process is about to cut."""
        records = self.running()
        if records:
            ids = ", ".join(record.request_id for record in records[:CUT_NAMED]) + ", …" * (len(records) > CUT_NAMED)
            self.log.warn(f"cut {plural(len(records), 'running request')}: {ids}")
            for record in records[:CUT_LINES]:
                record.error = "shutting_down"
                self.log.record(record, self.service.loop.clock())
        self.log.finish()

    def _run_in_loop(self, action: Callable[[], None]) -> None:
        """Runs the action in the loop's thread and waits for its end, unless that is stuck."""
        done = threading.Event()

        def act() -> None:
            try:
                action()
            finally:
                done.set()

        self.service.loop.post(act)
        done.wait(STUCK_SECONDS)

    def _accept_rest(self) -> None:
        """Serves those who were connected before the end; closing the socket would reset them."""
        for listener in self._listeners:
            for _ in range(LISTEN_BACKLOG):
                try:
                    self.process_request(*self._accept(listener))
                except BlockingIOError:
                    break  # there is nobody left
                except (OSError, *NO_MEMORY):  # it has left already, or there is no descriptor or memory for it
                    if self._spare.closed:
                        break  # nor one to refuse it with

    def _begin_draining(self) -> None:
        """Has new requests refused from now on. Posts what closes the connections on which none has come: of thousands,
        each takes 30 µs."""
        loop = self.service.loop
        self.service.draining = True
        while loop.arrived:  # who was connected before the end is answered
            loop.post(loop.arrived.take())
        for handler in list(self.handlers):
            loop.post(handler.close_if_idle)
        for page in list(self.service.pages):
            page.end()

    def _cut_all(self) -> None:
        """Ends the responses that are still on their way, each with an error where its client can read one."""
        for handler in list(self.handlers):
            if handler.task and handler.busy:
                handler.task.resume(shutting_down())
        self.service.loop.stop()
        self.service.relay.connections.close()

    # -- socketserver's protocol

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accepts a connection."""
        return self._accept(self.socket)

    def _accept(self, listener: socket.socket) -> tuple[socket.socket, Any]:
        """Accepts a connection there; without a descriptor for it, refuses it. Raises OSError, BlockingIOError where
        none is waiting."""
        try:
            sock, address = listener.accept()
        except OSError as error:
            if lacks_descriptor(error):
                with self._spare_lock:
                    self._refuse_without_descriptor(listener)
            raise
        tune(sock)
        return sock, address

    def _accept_first(self) -> None:
        """Accepts at the first address, until the server stops."""
        if self._accepting:
            self.serve_forever(0.1)

    def _accept_from(self, listener: socket.socket) -> None:
        """Does for the second address of localhost what serve_forever() does for the first one."""
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            while self._accepting:
                try:
                    if selector.select(0.1) and self._accepting:
                        self.process_request(*self._accept(listener))
                except OSError:
                    pass  # it has left already, or there is no descriptor for it
                except NO_MEMORY:
                    raise  # see outlast_shortage()
                except Exception:  # a defect ends that connection only
                    self.handle_error(listener, None)

    def accept_some(self) -> None:
        """Accepts some of those who wait, in the loop's thread: while that is busy, the threads that accept wait for
        CPython's lock at each connection, and those who wait behind thousands are known to nobody."""
        loop = self.service.loop
        latest = loop.clock() + ACCEPTING_SECONDS
        for listener in self._listeners:
            with contextlib.suppress(OSError):  # there is nobody left; or no descriptor, which the threads deal with
                while self._accepting and loop.clock() <= latest:
                    sock, address = listener.accept()
                    tune(sock)
                    self.process_request(sock, address)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Makes the Handler of a new connection; far beyond max_connections, refuses it."""
        if len(self.handlers) >= self.connection_limit + OVER_LIMIT_CONNECTIONS and self._refuses(client_address):
            refuse(request)
        else:
            self.finish_request(request, client_address)

    def _refuses(self, client_address: Any) -> bool:
        """Whether there is no place left for a new connection, not even to be told so. Of those that wait to be begun,
        only the ones from its own address count: the others don't go before it. Each of them makes room when it is
        begun; if none waits, room is made for the next one."""
        loop, network = self.service.loop, network_of(str(client_address[0]), TURN_BITS)
        own, most = loop.arrived.of(network), self.connection_limit + 2 * OVER_LIMIT_CONNECTIONS
        if own < most - len(self.handlers):
            return False
        if not own:
            loop.post(lambda: loop.arrived.put(self.make_room, network))
        return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Notes a defect that came through to here; socketserver would print a traceback."""
        error = sys.exc_info()[1]
        if error:
            self.log.warn(f"internal error: {describe(error)}")

    def _refuse_without_descriptor(self, listener: socket.socket) -> None:
        """Uses the spare descriptor to accept a connection and say no: left in the queue, it would keep the accept loop
        spinning, and its client waiting. Raises BlockingIOError where none is waiting: the system looks for a
        descriptor first."""
        now = time.monotonic()
        if now - self._refusal_logged > WARNING_SECONDS:
            self._refusal_logged = now
            self.log.warn("no file descriptor is left for another connection; raise `ulimit -n`")
        loop = self.service.loop
        if not loop.arrived.of(""):
            loop.post(lambda: loop.arrived.put(loop.make_room))
        try:
            self._spare.close()
            try:
                refuse(listener.accept()[0])
            finally:
                self._spare = io.FileIO(os.devnull)
        except BlockingIOError:
            raise
        except OSError:
            time.sleep(DESCRIPTOR_PAUSE_SECONDS)


OPEN_MAX = 10240  # files and connections of a process: macOS refuses to set no limit at all (its setrlimit(2))
# The errors of a machine that has no IPv6, or has it switched off.
NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)


def listen(server: ServerSettings) -> list[socket.socket]:
    """Sockets that listen where the settings say: for the name localhost on both loopback addresses, since clients may
    take it for either. Raises OSError."""
    if server.host != "localhost":
        return [listen_at(server.host, server.port)]
    first = listen_at("127.0.0.1", server.port)
    try:
        return [first, listen_at("::1", first.getsockname()[1])]
    except OSError as error:
        if error.errno in NO_SUCH_ADDRESS:
            return [first]
        first.close()
        if error.errno == errno.EADDRINUSE and not server.port:
            return listen(server)  # any number will do that is free on both
        raise


def listen_at(host: str, port: int) -> socket.socket:
    """A socket that listens at an address. Raises OSError that says how to go on."""
    listener = None
    try:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        # On Windows the option would let two relays share the port by accident.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(os.name != "nt"))
        listener.bind((host, port))
        listener.listen(LISTEN_BACKLOG)
    except OSError as error:
        if listener:
            listener.close()
        reason = error.strerror
        if error.errno == errno.EADDRINUSE:
            reason = f"{reason}: another relay may be running there; stop it, or try --port {port % 65535 + 1}"
        raise OSError(error.errno, f"can't listen on {host}:{port}: {reason}") from None
    return listener


def raise_descriptor_limit() -> None:
    """Lets this process open as many files and connections as the system's hard limit allows; where that is none, at
    least OPEN_MAX."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has none
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY:
            soft = hard
        elif soft != resource.RLIM_INFINITY:
            soft = max(soft, OPEN_MAX)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def descriptor_limit() -> int:
    """How many files and connections this process may open."""
    try:
        import resource
    except ImportError:  # Windows has none
        return LENGTHS
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return LENGTHS if limit == resource.RLIM_INFINITY else limit


def plural(count: int, noun: str) -> str:
    """So many of something."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


@functools.lru_cache(maxsize=4)
def refusal(format: str, second: int) -> bytes:
    """What tells clients that there is no room, for one second: to make it takes longer than to accept them."""
    record = AccessRecord(second, 0.0)
    message, code = "this relay can't take another connection now", "too_many_connections"
    body = error_body(format, "api_error", message, code, record.request_id)
    response = own_response(503, body, [("retry-after", "1"), ("x-monorelay-error", code)], record.request_id)
    return Outgoing(response, None, format, record).begin(False, record.started)


def refuse(sock: socket.socket) -> None:
    """Tells a client that there is no room, in the format of its path where that has come, and closes."""
    try:
        sock.setblocking(False)
        try:
            data = sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            data = b""
        sock.send(refusal(likely_format(data), int(time.time())))
    except OSError:
        pass  # it has left already
    finally:
        sock.close()


def relay_url(host: str, port: int) -> str:
    """The base URL of a relay that listens there, for clients on the same machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def with_run_secrets(config: Config, old: Optional[Config]) -> Config:
    """The configuration with what it leaves out made up for this run: an access key if there is no
    credential at all, and a secret for tokens if somebody can log in."""
    server, made = config.server, config.run_secrets or (old.run_secrets if old else None)
    if made is None:
        made = RunSecrets(Secret(f"mr-{base64url(os.urandom(24))}"), Secret(base64url(os.urandom(32))))
    if not server.access_keys and not server.jwt_secret and not config.user_keys:
        server = server._replace(access_keys=(made.access_key,))
    if not server.jwt_secret and any(user.password for user in config.users.values()):
        server = server._replace(jwt_secret=made.jwt_secret)
    return config._replace(server=server, run_secrets=made)


# ==== Processes =====================================================================================
#
# What stands around the serving: signals, edits of relay.json, and with `workers` a supervisor that replaces those that
# end. Each process serves for itself. The workers share the listening sockets, and a Board, on which each shows what
# the others need for limits, cooldowns and the page. Each sees an edit of relay.json by itself, within a second, or at
# a SIGHUP that the supervisor passes on.


# Python 3.14 takes `__file__` away when the script has ended, which the relay outlasts.
PROGRAM_PATH = os.path.abspath(__file__)


def config_path(options: JsonDict) -> str:
    """The file to serve: the one named, ./relay.json, or the one beside this file; empty if there is none."""
    if "config" in options:
        return str(options["config"])
    shipped = os.path.join(os.path.dirname(PROGRAM_PATH), "relay.json")
    return next((path for path in ("relay.json", shipped) if os.path.exists(path)), "")


def config_name(path: str) -> str:
    """The name of a configuration in messages."""
    return os.path.basename(path) or "built-in configuration"


def load_config(path: str, options: JsonDict) -> Config:
    """The configuration in a file, with the address of the command line. Raises ConfigError and OSError."""
    name = config_name(path)
    if path:
        with open(path, "rb", opener=open_regular) as file:
            data = file.read()
        if json.detect_encoding(data).startswith("utf-16"):
            raise ConfigError([f"{name}: is in UTF-16; save it as UTF-8"])
        try:
            source = data.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise ConfigError([f"{name}: byte {error.start} is not UTF-8"]) from None
    else:
        source = BUILT_IN_CONFIG
    env_file, env_seen, environ = environment(source, path)
    try:
        config = parse_config(source, environ, name)
    except RecursionError:
        raise ConfigError([f"{name}: it is nested, or its aliases are chained, too deeply"]) from None
    changed: JsonDict = {name: options[name] for name in ("host", "port") if name in options}
    if not config.server.access_keys:
        try:
            changed["access_keys"] = as_access_keys(environ.get("MONORELAY_ACCESS_KEY", ""))
            problem = shared_key(changed["access_keys"], config.user_keys)
        except ValueError as error:
            problem = str(error)
        if problem:
            raise ConfigError([f"the environment's MONORELAY_ACCESS_KEY: {problem}"])
    seen = [*env_seen, *states_beside(path, config.prices_file)]
    config = config._replace(server=config.server._replace(**changed), env_file=env_file, beside_seen=seen)
    config = with_ledger_beside(config, path, name)
    if config.server.workers > 1 and not hasattr(os, "fork"):
        raise ConfigError([f"{name}: server.workers: must be 1 on this system"])
    obstacle = start_obstacle(config)
    if obstacle:
        raise ConfigError([f"{name}: {obstacle}"])
    return config


def with_ledger_beside(config: Config, path: str, name: str) -> Config:
    """The configuration with its ledger's path made absolute. Raises ConfigError for budgets that can't be kept."""
    if not config.ledger:
        return config
    if not sqlite3:
        limited = next((user.name for user in config.users.values() if user.has_budget), "")
        if limited:
            raise ConfigError([f"{name}: users.{limited}: has a budget, and this Python has no sqlite3 for the ledger"])
    return config._replace(ledger=config.ledger._replace(path=beside(path, config.ledger.path)))


def beside(path: str, name: str) -> str:
    """The absolute path of a file that is named in relay.json, which is at `path`."""
    return os.path.join(os.path.dirname(os.path.abspath(path or "relay.json")), name)


def states_beside(path: str, *names: str) -> list[tuple[int, ...]]:
    """The states of files that are named in relay.json, which is at `path`; an empty name is none."""
    return [file_state(beside(path, name)) for name in names if name]


def load_prices(config: Config, path: str) -> Config:
    """The configuration with the prices of the file that it names. Raises ConfigError for a file that can't be read or
    is broken, and OSError when there is no descriptor to read it with."""
    if not config.prices_file:
        return config
    place = f"{os.path.basename(path)}: prices: {config.prices_file}"
    try:
        with open(beside(path, config.prices_file), "rb", opener=open_regular) as file:
            prices = parse_prices(parse_json(file.read()))
            changed = os.fstat(file.fileno()).st_mtime
    except OSError as error:
        if lacks_descriptor(error):
            raise
        raise ConfigError([f"{place}: can't be read: {error.strerror}"]) from None
    except ValueError as error:
        raise ConfigError([f"{place}: {error}"]) from None
    return config._replace(prices=prices._replace(as_of=windows(changed)[0]))


def environment(source: str, path: str) -> tuple[str, list[tuple[int, ...]], dict[str, str]]:
    """The `env_file` of a relay.json, if it has one; its state before it was read; and what the variables stand for:
    the environment of the start, the lines of the env_file, and the content of each file that is named. Raises
    ConfigError for an env_file that can't be read, and OSError when there is no descriptor to read one with."""
    problems = Problems(os.path.basename(path))
    try:
        document = json.loads(source)
        variables = {match[1] for text in texts_in(document) for match in re.finditer(VARIABLE, text)}
    except (ValueError, RecursionError):
        document, variables = None, set()  # parse_config() will say why
    files = [name for name in variables if name.startswith("file:")]
    found = {name: read_secret(beside(path, name[len("file:") :])) for name in files}
    environ = {**os.environ, **{name: content for name, content in found.items() if content is not None}}
    name = document.get("env_file") if isinstance(document, dict) else None
    name = expand_text(name, "env_file", environ, problems) if isinstance(name, str) else ""
    if problems.lines:
        raise ConfigError(problems.lines)
    seen = states_beside(path, name)
    lines: dict[str, str] = {}
    if name:
        env_path = beside(path, name)
        try:
            with open(env_path, encoding="utf-8-sig", opener=open_regular) as file:
                lines = dict(filter(None, map(env_line, file)))
        except (OSError, ValueError) as error:
            if lacks_descriptor(error):
                raise
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            told = f"{os.path.basename(path)}: env_file: {name} can't be read: {reason}"
            raise ConfigError([told], env_path) from None
    return str(name), seen, {**lines, **environ}


def texts_in(document: Any) -> Iterator[str]:
    """The strings of a JSON document, but for names and comments."""
    if isinstance(document, dict):
        document = [value for key, value in document.items() if not key.startswith("//")]
    if isinstance(document, list):
        for value in document:
            yield from texts_in(value)
    elif isinstance(document, str):
        yield document


def read_secret(path: str) -> Optional[str]:
    """A file's content without white space at its ends; None if it can't be read. Raises OSError when there is no
    descriptor to read it with."""
    try:
        with open(path, encoding="utf-8", opener=open_regular) as file:
            return file.read(SECRET_FILE_CHARACTERS).strip()
    except (OSError, ValueError) as error:
        if lacks_descriptor(error):
            raise
        return None


def open_regular(path: str, flags: int) -> int:
    """Opens a file of the configuration for open(). Raises OSError, also for a pipe or a device: to read it may take
    forever, and no signal is heeded meanwhile."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_size <= CONFIG_BYTES:
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, f"it must be a regular file of up to {CONFIG_BYTES // MEGABYTE} MB", path)


def env_line(line: str) -> Optional[tuple[str, str]]:
    """Name and value of a line NAME=VALUE, as systemd and Docker read it; None for a comment or an empty line."""
    name, equals, value = line.strip().partition("=")
    name, value = name.removeprefix("export ").strip(), value.strip()
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]
    return (name, value) if equals and not name.startswith("#") else None


class Board:
    """What the workers of a relay show one another: anonymous memory, made before they are forked. Each place has one
    writer. It holds two documents, of which one is being written while the other is read; a head in front says which,
    and by a checksum whether it was whole when it was read."""

    _HEAD = struct.Struct("<QII")  # how often it was written, length and CRC-32 of the document
    _ROOM = (BOARD_PLACE_BYTES - _HEAD.size) // 2  # for each of the two documents

    def __init__(self, places: int) -> None:
        self.places = places
        self._memory = mmap.mmap(-1, places * BOARD_PLACE_BYTES)
        self.requests = memoryview(mmap.mmap(-1, places // 2 * SharedThrottle.BYTES)).cast("Q")  # of users with a limit

    def _begin(self, place: int, number: int) -> int:
        """The offset of the document with this number, which decides between the two rooms of the place."""
        return place * BOARD_PLACE_BYTES + self._HEAD.size + number % 2 * self._ROOM

    def number(self, place: int) -> int:
        """How often the place was written."""
        return int(self._HEAD.unpack_from(self._memory, place * BOARD_PLACE_BYTES)[0])

    def write(self, place: int, document: JsonDict) -> bool:
        """Shows a document instead of the last one; False, and the last one stays, if there is no room for it."""
        data = json.dumps(document, separators=(",", ":")).encode("ascii")
        if len(data) > self._ROOM:
            return False
        start, number = place * BOARD_PLACE_BYTES, self.number(place) + 1
        begin = self._begin(place, number)
        self._memory[begin : begin + len(data)] = data
        head = self._HEAD.pack(number, len(data), zlib.crc32(data))
        self._memory[start : start + len(head)] = head
        return True

    def write_figures(self, place: int, figures: JsonDict) -> None:
        """Shows what was counted; of the requests that run or have ended, as many as there is room for."""
        tally, running = figures["tally"], figures["running"]
        for rows in (ENDED_ROWS, 100, 10, 0):
            fewer = {**tally, "ended": tally["ended"][-rows:] if rows else []}
            if self.write(place, {**figures, "tally": fewer, "running": running[:rows]}):
                return

    def read(self, place: int) -> Optional[JsonDict]:
        """The document of a place; None where there is none, or it is being written too often."""
        for _ in range(BOARD_READS):
            number, size, checksum = self._HEAD.unpack_from(self._memory, place * BOARD_PLACE_BYTES)
            begin = self._begin(place, number)
            data = self._memory[begin : begin + min(size, self._ROOM)]
            if number and zlib.crc32(data) == checksum:
                document: JsonDict = json.loads(data)
                return document
        return None


class PlaceOnBoard(NamedTuple):
    """A worker's view of the board: what it shows, and what the others do. Each has two places, one for what has to be
    known soon, one for its figures; the last place of all is for the figures of those that have ended."""

    board: Board
    worker: int

    def throttle(self) -> SharedThrottle:
        """What counts the requests of users with a limit, for all workers."""
        return SharedThrottle(self.board.requests, self.worker)

    def show(self, document: JsonDict) -> None:
        """Shows which keys cool, and what was spent; the latter alone where there is no room for both."""
        if not self.board.write(2 * self.worker, document):
            self.board.write(2 * self.worker, {**document, "cooling": []})

    def show_figures(self, figures: JsonDict) -> None:
        """Shows what this worker has counted, and what runs."""
        self.board.write_figures(2 * self.worker + 1, figures)

    def news(self, seen: dict[int, int]) -> dict[int, JsonDict]:
        """The documents of others, by place, that are newer than those `seen`, which is brought up to date."""
        changed = {}
        for place in range(0, self.board.places - 1, 2):
            number = self.board.number(place)
            if seen.get(place) != number and place != 2 * self.worker:
                seen[place] = number
                changed[place] = self.board.read(place) or {}
        return changed

    def other_figures(self) -> Iterator[JsonDict]:
        """The figures of all others, and of those that have ended, each read when it is asked for."""
        places = [*range(1, self.board.places - 1, 2), self.board.places - 1]
        return filter(None, (self.board.read(place) for place in places if place != 2 * self.worker + 1))

    def keep_figures(self) -> None:
        """Adds the figures of this worker, which has ended, to those of the others that have."""
        last = self.board.places - 1
        tally, gauges = Tally(math.inf), collections.Counter[str]()
        kept = list(filter(None, map(self.board.read, (last, 2 * self.worker + 1))))
        for figures in kept:
            tally.include(figures["tally"])
            gauges.update({name: value for name, value in figures["gauges"].items() if name.endswith("_total")})
        keys = [[*name, record] for name, record in records_by_key(figures["keys"] for figures in kept).items()]
        self.board.write_figures(last, {"tally": tally.shared(), "running": [], "keys": keys, "gauges": gauges})
        for place in (2 * self.worker, 2 * self.worker + 1):
            self.board.write(place, {})


OPERATOR_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")
# By these a supervisor has its workers reload and end at once. A SIGHUP or a second SIGTERM, which may have reached the
# whole group, is nothing to them, so that it counts once.
WORKER_RELOADS, WORKER_CUTS = "SIGUSR1", "SIGUSR2"


class Signals:
    """Signals as a queue that any thread may read, so that none interrupts other work.

    Python's own handlers run in the main thread, and only when that next wakes up; so what counts is the byte
    that set_wakeup_fd has written for each. To be made in the main thread."""

    def __init__(self, *names: str) -> None:
        self._queue, self._far = socket.socketpair()
        self._received = b""  # and not told yet
        self._far.setblocking(False)
        signal.set_wakeup_fd(self._far.fileno(), warn_on_full_buffer=False)
        for name in names:
            if hasattr(signal, name):  # Windows has few
                signal.signal(getattr(signal, name), lambda number, frame: None)
        if hasattr(signal, "pthread_sigmask"):  # whoever has started this process may have held them back
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {getattr(signal, name) for name in names})

    def next(self, seconds: float) -> str:
        """The name of the next signal, or nothing after so many seconds. Reloads that follow each other are one."""
        if not self._received:
            self._queue.settimeout(seconds)
            try:
                self._received = self._queue.recv(4096)
            except socket.timeout:
                return ""
        first, rest = self._received[:1], self._received[1:]
        name = signal.Signals(first[0]).name
        self._received = rest.lstrip(first) if name in ("SIGHUP", WORKER_RELOADS) else rest
        return name

    def pass_over_copies(self) -> None:
        """Drops signals that ask for the end once more within TOGETHER_SECONDS of the first."""
        time.sleep(TOGETHER_SECONDS)
        self._queue.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            self._received += self._queue.recv(4096)
        self._received = self._received.translate(None, bytes((signal.SIGTERM, signal.SIGINT)))


class ConfigFile:
    """relay.json and the files that it names, as they are edited: the last configuration that could be read of them. A
    supervisor reads them as its workers do, so that a new worker begins with what the others serve by."""

    def __init__(self, config: Config, path: str, options: JsonDict, seen: tuple[int, ...]) -> None:
        self.config = config
        self.problem = ""  # what was broken when they were read last
        self._path = path and os.path.abspath(path)  # the directory that it began in may be removed while it serves
        self._options = options
        self._host = config.server.host  # where the relay listens, whatever is edited
        self._unread = ""  # a file that an edit has named, and that couldn't be read
        self._seen = [seen, *config.beside_seen, ()]  # the states of the files that were read

    def _states(self) -> list[tuple[int, ...]]:
        """The states of relay.json, and of the files that it names, or that an edit has named in vain."""
        named = states_beside(self._path, self.config.env_file, self.config.prices_file)
        return [file_state(self._path), *named, file_state(self._unread)]

    def has_changed(self) -> bool:
        """Whether one was edited since they were read."""
        if not self._path:
            path = config_path(self._options)  # it may have come since the start
            self._path = path and os.path.abspath(path)
        return self._states() != self._seen

    def read(self) -> bool:
        """Reads them again; whether that made a configuration. A broken relay.json changes nothing, broken prices keep
        those of before."""
        self._seen = self._states()
        self.problem = ""
        try:
            config = self._with_prices(load_config(self._path, self._options))
            obstacle = start_obstacle(config._replace(server=config.server._replace(host=self._host)))
            if obstacle:
                raise ConfigError([f"{config_name(self._path)}: {obstacle}"])
        except NO_MEMORY:
            self.read_later()
            self.problem = "there is no memory to read the configuration; another try follows"
            return False
        except (ConfigError, OSError) as error:
            if lacks_descriptor(error):
                self.read_later()  # there is no descriptor to read it with
                return False
            problem = system_problem(error) if isinstance(error, OSError) else str(error)
            self.problem = f"{problem}\nthe configuration was not reloaded; the one before stays in force"
            self._unread = error.unread if isinstance(error, ConfigError) else ""
            self._seen[-1] = file_state(self._unread)
            return False
        self.config = with_run_secrets(config, self.config)
        self._unread = ""
        self._seen[1:] = [*config.beside_seen, ()]
        return True

    def read_later(self) -> None:
        """Has them read again in a second."""
        self._seen = []

    def _with_prices(self, config: Config) -> Config:
        """The configuration with its prices, or with those of before when the file is broken."""
        try:
            return load_prices(config, self._path)
        except ConfigError as error:
            self.problem = f"{error}; the prices of before stay in force"
            return config._replace(prices=self.config.prices)


class Operator:
    """Waits for signals and for edits of relay.json while the other threads serve."""

    def __init__(self, server: RelayServer, file: ConfigFile, supervisor: int = 0, tells: bool = True) -> None:
        self._server = server
        self._file = file
        self._supervisor = supervisor  # its process id, in a worker
        self._tells = tells  # whether it logs what happens to all workers
        self._in_terminal = not supervisor and in_terminal()
        self._end = ""  # the signal that ends it, once that has come
        self._stopping: Optional[threading.Thread] = None  # in which the server stops

    def run(self, signals: Signals) -> int:
        """Serves until SIGTERM, SIGINT or the death of the supervising process; the exit status. May be called again
        where there was no memory."""
        reloads, supervisor = WORKER_RELOADS if self._supervisor else "SIGHUP", self._supervisor
        while True:
            name = self._end or signals.next(1.0)
            is_orphan = supervisor and os.getppid() != supervisor
            if name == WORKER_CUTS or is_orphan or asks_for_end(name, self._in_terminal):
                self._end = name
                self._drain(signals, name == WORKER_CUTS)
                return 0
            try:
                if name == reloads or self._file.has_changed():
                    self.reload()
            except Exception as error:  # a defect; what was read before stays in force
                self._server.log.warn(f"internal error: {describe(error)}")

    def reload(self) -> None:
        """Reads relay.json again, and the files that it names, and serves by them."""
        log = self._server.log if self._tells else LogWriter(None)
        is_read = self._file.read()
        for line in self._file.problem.splitlines():
            log.warn(line)
        try:
            if is_read:
                self._server.reload(self._file.config, self._tells)
                log.say("the configuration was reloaded; values of the environment are those of the start")
        except RuntimeError:  # the system gives out no thread for a ledger
            self._file.read_later()
            log.warn("there is no thread for the ledger, so the configuration was not reloaded; another try follows")

    def _drain(self, signals: Signals, cuts: bool) -> None:
        """Stops in good order; another signal, or one that `cuts`, ends the process at once."""
        ends = (WORKER_CUTS,) if self._supervisor else ("SIGTERM", "SIGINT")
        if not (self._supervisor or self._stopping):
            signals.pass_over_copies()
        stopping = self._stopping = self._stopping or self._stop()
        while stopping.is_alive():
            name = "" if cuts else signals.next(0.02)
            if name in ends or cuts:
                self._server.tell_of_cut()
                os._exit(128 + signal.Signals[name or WORKER_CUTS])

    def _stop(self) -> threading.Thread:
        """The thread in which the server stops from now on."""
        server = self._server
        running = len(server.running())
        if not self._supervisor:
            what = f": {plural(running, 'request')} {'is' if running == 1 else 'are'} running; a second signal ends "
            server.log.say(f"stopping{what}{'it' if running == 1 else 'them'}" if running else "stopping")
        seconds = server.service.config.server.drain_seconds
        stopping = threading.Thread(target=server.stop, args=(seconds,), daemon=True)
        try:
            stopping.start()
        except RuntimeError:  # the system gives out no more threads, so no second signal is waited for
            server.stop(seconds)
        return stopping


class Supervisor:
    """The parent of several workers, which share its listening sockets: it replaces one that dies, and
    passes signals on. Each worker is a relay of its own, with its own loop, kept connections and threads."""

    def __init__(self, file: ConfigFile, listeners: Sequence[socket.socket]) -> None:
        self._file = file
        self._count = file.config.server.workers  # which a reload doesn't change
        self._listeners = listeners
        self._log = LogWriter(sys.stderr, file.config.server.log)
        self._workers: dict[int, tuple[float, int]] = {}  # process id: when it was started, and its place on the board
        self._board = Board(2 * self._count + 1)
        self._in_terminal = in_terminal()

    def run(self, signals: Signals, lines: Sequence[str]) -> int:
        """Serves until SIGTERM or SIGINT; the exit status."""
        # Python warns of forks beside threads. The one here writes the log, and holds nothing that a worker needs.
        warnings.simplefilter("ignore", DeprecationWarning)
        self._log.announce(lines)
        self._log.start()
        name = ""
        while not asks_for_end(name, self._in_terminal):
            try:
                self._look_after(name)
            except Exception as error:  # a defect, or there is no memory; its workers serve meanwhile
                self._log.warn(f"internal error: {describe(error)}")
            name = outlast_shortage(lambda: signals.next(1.0))
        return self._stop(signals)

    def _look_after(self, name: str) -> None:
        """Does what a signal asks for, if one has come, and starts the workers that are missing."""
        if name == "SIGHUP":
            self._file.read()
            self._pass_on(signal.Signals[WORKER_RELOADS])
        ended = list(self._reap())
        for pid, _ in ended:
            self._log.warn(f"the worker {pid} has ended; another one takes its place")
        if any(time.monotonic() - started < 1.0 for _, started in ended):
            time.sleep(1.0)  # one that can't even start must not be started without end
        if len(self._workers) < self._count or self._file.has_changed():
            self._file.read()
        self._log.style = self._file.config.server.log
        while len(self._workers) < self._count and self._start_worker():
            pass

    def _start_worker(self) -> bool:
        """Starts a worker; False when the system gives out no more processes."""
        parent, taken = os.getpid(), {worker for _, worker in self._workers.values()}
        place = PlaceOnBoard(self._board, min(set(range(self._count)) - taken))
        # What comes between the fork and the worker's own handlers has to wait for these.
        held = {getattr(signal, name) for name in (*OPERATOR_SIGNALS, WORKER_RELOADS, WORKER_CUTS)}
        signal.pthread_sigmask(signal.SIG_BLOCK, held)
        try:
            pid = os.fork()
            if not pid:
                self._be_worker(parent, place)
        except OSError as error:
            self._log.warn(f"a worker can't be started, another try follows: {error.strerror}")
            return False
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
        self._workers[pid] = time.monotonic(), place.worker
        for line in self._file.problem.splitlines()[:1]:
            self._log.warn(f"the new worker {pid} serves by the last configuration that could be read: {line}")
        return True

    def _be_worker(self, parent: int, place: PlaceOnBoard) -> NoReturn:
        """Runs a worker, and ends its process."""
        status = 1
        try:
            signals = Signals(*OPERATOR_SIGNALS, WORKER_RELOADS, WORKER_CUTS)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            server = RelayServer(self._file.config, None, self._listeners, place)
            operator = Operator(server, self._file, parent, place.worker == 0)
            server.start()
            status = outlast_shortage(lambda: operator.run(signals))
        except BaseException as error:
            log = LogWriter(sys.stderr, self._file.config.server.log)
            log.warn(f"internal error: {describe(error)}")
            log.start()
            log.finish()
        finally:
            os._exit(status)

    def _reap(self) -> Iterator[tuple[int, float]]:
        """The workers that have ended, and when each was started."""
        while self._workers:
            pid = os.waitpid(-1, os.WNOHANG)[0]
            if not pid:
                return
            if pid not in self._workers:
                continue  # a shell's that has started it before this program took its place, or an orphan of process 1
            started, worker = self._workers.pop(pid)
            PlaceOnBoard(self._board, worker).keep_figures()
            yield pid, started

    def _pass_on(self, number: int) -> None:
        for pid in self._workers:
            with contextlib.suppress(ProcessLookupError):  # it has just ended, and will be reaped
                os.kill(pid, number)

    def _stop(self, signals: Signals) -> int:
        """Drains all workers; a second signal ends them at once, and one that takes longer than any should is killed.
        The exit status."""
        signals.pass_over_copies()
        seconds = self._file.config.server.drain_seconds
        self._log.say(f"stopping; what runs may take {seconds:g} s more, a second signal ends it at once")
        for listener in self._listeners:
            listener.close()
        self._pass_on(signal.SIGTERM)
        status, latest = 0, time.monotonic() + seconds + LEDGER_LAST_SECONDS + CUT_SECONDS
        while self._workers:
            if signals.next(0.1 if status else 1.0) in ("SIGTERM", "SIGINT"):
                self._pass_on(signal.SIGKILL if status else signal.Signals[WORKER_CUTS])
                status, latest = 1, time.monotonic() + CUT_SECONDS
            if time.monotonic() > latest:
                status = 1
                self._pass_on(signal.SIGKILL)
            for _ in self._reap():
                pass
        self._log.finish()
        return status


def system_problem(error: OSError) -> str:
    """The message of an OSError: file and reason, without the error number."""
    return f"{error.filename or ''}{': ' if error.filename else ''}{error.strerror or error}"


def asks_for_end(name: str, began_in_terminal: bool) -> bool:
    """Whether a signal asks for the end. SIGHUP does if the terminal of the start is gone; else it is for a reload."""
    return name in ("SIGTERM", "SIGINT") or (name == "SIGHUP" and began_in_terminal and not in_terminal())


def in_terminal() -> bool:
    """Whether one of the standard streams is at a terminal that is still there."""
    return any(os.isatty(descriptor) for descriptor in (0, 1, 2))


# -- what CPython makes us do


def enlarge_stacks() -> None:
    """Lets all threads that are started from now on recurse as deeply as Python does."""
    with contextlib.suppress(ValueError, RuntimeError):  # this system has no say in it
        if sys.platform != "darwin":  # where they have 16 MB
            threading.stack_size(STACK_BYTES)


def outlast_script(serve: Callable[[], int]) -> int:
    """Lets the main script end while a second thread serves. CPython frees the syntax tree of this file, a third of the
    whole process, only when the script has ended."""
    return_memory = find_malloc_trim()

    def run() -> None:
        status = 1  # should it end by a defect
        try:
            threading.main_thread().join()
            return_memory(0)
            status = serve()
        finally:
            # Python's own way out would wait for a thread that writes to a log which nobody reads.
            os._exit(status)

    # Python 3.12.0 and 3.12.1 start no thread any more when the script has ended (CPython issue 113964).
    if sys.version_info[:3] not in ((3, 12, 0), (3, 12, 1)):
        with contextlib.suppress(RuntimeError):  # the system gives out no more threads
            threading.Thread(target=run, name="operator").start()
            return 0
    os._exit(serve())


# ==== Page =======================================================================================
#
# The one room that a room above names: it is a thousand lines of another kind, and out of the way here.
#
# The live page is one document without any data: style, markup and script, no library, nothing from elsewhere. It signs
# in, keeps the token for its tab, and asks /api/live, /api/usage and /api/requests for what it shows.
#
# What it shows was named by clients: models, users, paths, errors. So it makes text of everything and markup of
# nothing, and its policy has the browser take only the script and the style that stand here, by their hashes. `style`
# attributes are forbidden with that: what varies is set by the script.
#
# What happens comes from memory by /api/live, what has happened from the sums by the hour and from the ledger. A hidden
# tab closes its stream and draws nothing. Of ten thousand requests, only the sixty rows or so in sight are elements.


PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>MonoRelay</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Cpath
 d='M1 3h4l3 5 3-5h4M1 13h4l3-5 3 5h4' fill='none' stroke='%233c7a8c' stroke-width='2'/%3E%3C/svg%3E">
<style>
:root {
  color-scheme: light dark;
  --page: light-dark(#f6f6f3, #121416); --panel: light-dark(#ffffff, #1a1d20); --line: light-dark(#e3e3dd, #2b3035);
  --ink: light-dark(#1c2024, #e4e5e2); --quiet: light-dark(#585e65, #adb5bc); --thin: 1px solid var(--line);
  --accent: light-dark(#2b6f83, #7cbccd); --bar: light-dark(#8db4bf, #48788a);
  --good: light-dark(#2a7549, #74c493); --warn: light-dark(#8a5a00, #e2b35a); --bad: light-dark(#b3261e, #ff8f85);
  font: 13px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums;
}
@media (width >= 2000px) { :root { font-size: 18px; } }
* { box-sizing: border-box; margin: 0; }
body { background: var(--page); color: var(--ink); padding: 0 max(1rem, 50vw - 62rem) 1.5rem; }
[hidden], .own .others { display: none !important; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
.note, th, dt { color: var(--quiet); font-weight: 400; }
[data-tone=""] { --tone: initial; }
[data-tone="good"] { --tone: var(--good); }
[data-tone="warn"] { --tone: var(--warn); }
[data-tone="bad"] { --tone: var(--bad); }
.tone:not(th) { color: var(--tone); }

button, select, input { font: inherit; color: inherit; }
button, select, .field input { background: var(--panel); border: var(--thin); border-radius: 5px; padding: .2em .6em; }
select { max-width: 12rem; }
button:is(:hover, :focus-visible) { text-decoration: underline; text-underline-offset: 3px; }
.plain { background: none; border: 0; padding: 0; max-width: 100%; letter-spacing: inherit; }
.plain, .cut, .tiles dd:not(.note), #rows td { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
:is(.name, .name .plain) { white-space: normal; overflow-wrap: anywhere; text-align: inherit; }
code { font: .92em ui-monospace, monospace; background: var(--page); padding: .1em .35em; overflow-wrap: anywhere; }
h1 { font-size: 1.25rem; font-weight: 650; letter-spacing: -.01em; }
h1 svg { width: 1.1em; vertical-align: -.15em; margin-right: .3em; fill: none; stroke: var(--accent); stroke-width: 2; }
h2 { font-size: 1rem; font-weight: 600; }

header, .bar, .gauges, .tiles { display: flex; flex-wrap: wrap; align-items: center; gap: .4rem .9rem; }
label, .gauge { display: flex; align-items: center; gap: .5rem; }
header { padding: .7rem 0 .3rem; }
#status { font-size: 1.15rem; line-height: 1.4; padding-bottom: .7rem; overflow-wrap: anywhere; }
.end { margin-left: auto; }
.panel { background: var(--panel); border: var(--thin); border-radius: 8px; padding: .6rem .9rem .5rem; min-width: 0; }
main { display: grid; grid-template-columns: minmax(0, 7fr) minmax(0, 6fr); gap: .75rem; }
main > :not(.beside) { grid-column: 1 / -1; }
.tiles { align-items: stretch; gap: .75rem; }
.tiles > div { flex: 2 1 8.7rem; }
.tiles > div:nth-child(5) { flex: 1 1 18.5rem; }
.tiles > div:nth-child(6) { flex: 7 1 19rem; }
.tiles dt + dd { font-size: 1.55rem; line-height: 1.4; font-weight: 550; letter-spacing: -.02em; }
#failure div { display: contents; }
.beside:has(#chart) { display: flex; flex-direction: column; }
#box { overflow: auto; scrollbar-width: thin; max-height: min(75vh, 60rem); overscroll-behavior: contain; }
#box { overflow-anchor: none; contain: content; }

table { width: 100%; border-collapse: collapse; }
th { font-size: .92em; }
#box th { position: sticky; top: 0; z-index: 1; background: var(--panel); box-shadow: 0 1px var(--line); }
td { border-bottom: var(--thin); }
tr:last-child > td { border: 0; }
#rows tr { cursor: pointer; }
#rows .day { box-shadow: 0 -2px var(--quiet); }
#rows tr:hover { background: color-mix(in srgb, var(--bar) 12%, transparent); }
tbody:not(#rows, #keys):empty::before { content: "none"; color: var(--quiet); }
.gauges { gap: 0 1.2rem; }
.gauge svg { flex: none; width: 4rem; height: .6rem; border-radius: .2rem; background: var(--line); }
.gauge rect { fill: var(--tone, var(--bar)); }
#chart { flex: 1 1 11rem; contain: size; padding: 1.4rem 0 1.6rem 2.7rem; font-size: .85rem; fill: var(--quiet); }
#chart svg { width: 100%; height: 100%; overflow: visible; text-anchor: middle; }
#chart .scale { text-anchor: end; }
#chart line { stroke: var(--line); }
#chart .all { fill: transparent; }
#chart .ok { fill: var(--bar); }
#chart .failed { fill: var(--bad); }

dialog { margin: auto; width: min(34rem, 94vw); padding: 1.2rem 1.4rem; overflow-wrap: anywhere; }
dialog { background: var(--panel); color: inherit; border: var(--thin); border-radius: 10px; }
:is(dialog, dialog form) > * + * { margin-top: .8rem; }
#facts { display: grid; grid-template-columns: auto 1fr; gap: .15rem 1.2rem; }
ol { padding-left: 1.3rem; }
#signin { width: min(24rem, 94vw); }
.field, .field input, #signin button { display: block; width: 100%; }
.field input, #signin button { background: var(--page); padding-block: .45rem; }
#signin button { background: var(--accent); color: var(--panel); }
#problem { color: var(--bad); }

@media (width > 640px) {
  th, td { text-align: left; padding: .28rem .8rem .28rem 0; }
  :is(th, td):not(.name) { white-space: nowrap; }
  .name { min-width: 5.5rem; }
  #users .gauges { display: grid; }
  :is(th, td):last-child { padding-right: .3rem; }
  .num { text-align: right; }
  #box table { table-layout: fixed; min-width: 84rem; }
  #rows td { height: round(1.95rem, 1px); padding-block: 0; }
  #rows .why:has(+ td:empty) { overflow: visible; } /* over the figures, of which there are none */
  .why:has(+ td:empty) .cut { display: block; width: 285%; }
}
@media (width <= 1400px) { .beside .extra { display: none; } }
@media (width <= 1000px) { main > .beside { grid-column: 1 / -1; } }
@media (width <= 640px) { /* a row becomes a card of four columns, of figures below their titles */
  header { gap: .2rem .7rem; }
  main { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .6rem; }
  .tiles { display: contents; }
  .panel, .tiles > div:nth-child(5) { order: 5; }
  .tiles > div:nth-child(n + 5) { grid-column: 1 / -1; }
  .tiles > div:nth-child(6), #advice { order: 1; }
  .panel:has(#running) { order: 2; }
  #failure { order: 3; }
  .panel:has(#keys) { order: 4; }
  .panel:is(:has(#users, #models, #chart, #box)) { order: 6; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table, tbody { display: block; }
  tbody tr { display: grid; grid: auto-flow dense / repeat(4, minmax(0, 1fr)); gap: 0 .6rem; align-content: start; }
  tbody tr { padding: .4rem 0; border-bottom: var(--thin); }
  tr:last-child { border: 0; }
  #running { display: grid; grid-template-columns: auto 1fr auto; }
  #running tr { grid: auto / subgrid; grid-column: 1 / -1; }
  #running .num { grid-column: 3; }
  #box { max-height: none; overflow: visible; }
  #rows tr { height: round(8.4rem, 1px); }
  td { border: 0; padding: 0; overflow: hidden; text-overflow: ellipsis; }
  .half { grid-column: span 2; }
  .line { grid-column: 1 / -1; }
  .why .cut { display: block; max-height: 3lh; white-space: normal; overflow-wrap: anywhere; }
  td:not(.bare)::before { content: attr(data-title); display: block; font-size: .8em; color: var(--quiet); }
  .extra, .away, td:empty { display: none; }
}
</style>
<header>
  <h1><svg viewBox="0 0 16 16" aria-hidden="true"><path d="M1 3h4l3 5 3-5h4M1 13h4l3-5 3 5h4"/></svg>MonoRelay</h1>
  <span class="note extra" id="where"></span>
  <span class="tone" id="link"><span id="sign" aria-hidden="true">◌</span> <span id="words">connecting</span></span>
  <span class="bar end"><select id="days" aria-label="Period" title="Days are those of UTC" hidden>
    <option value="">today<option value="7">7 days<option value="30">30 days</select>
    <span class="note" id="me"></span><button id="leave" type="button" hidden>Sign out</button></span>
</header>
<p role="status" id="status">◌ Connecting</p>
<main hidden>
  <dl class="tiles" id="tiles"></dl>
  <section class="panel" id="advice" hidden><h2>What to set next</h2><div></div></section>
  <section class="panel bar" id="failure"><h2>Last failed request</h2><div></div></section>
  <section class="panel beside"><div class="bar"><h2>Running</h2><span class="note" id="active"></span></div>
    <table><tbody id="running"></table></section>
  <section class="panel beside"><div class="bar"><h2>Requests an hour</h2><span class="note" id="charted"></span></div>
    <div id="chart"></div></section>
  <section class="panel others"><div class="bar"><h2>Keys</h2><span class="note" id="counted"></span></div>
    <table><tbody id="keys"></table></section>
  <section class="panel beside"><div class="bar"><h2 id="whose">Users</h2><span class="note period"></span></div>
    <table><tbody id="users"></table></section>
  <section class="panel beside"><div class="bar"><h2>Models</h2><span class="note period"></span></div>
    <table><tbody id="models"></table></section>
  <section class="panel">
    <form class="bar" id="filters"><h2>Requests</h2><span class="note">newest first</span>
      <span class="note end" id="loaded"></span>
      <label><input type="checkbox" name="errors"> failed only</label>
      <select name="user" class="others" aria-label="User"></select><select name="model" aria-label="Model"></select>
      <select name="key" class="others" aria-label="Key"></select>
      <button type="button" id="clear" hidden>Show all</button></form>
    <div id="box" role="region" tabindex="0" aria-label="Requests">
      <table><tbody id="rows"></table><p class="note" id="none"></p></div>
  </section>
</main>
<dialog id="signin" aria-label="Sign in"><form>
  <h2>Sign in to MonoRelay</h2>
  <label class="field">User <input name="username" autocomplete="username" autofocus></label>
  <label class="field">Password <input name="password" type="password" autocomplete="current-password"></label>
  <label class="field">or a key of the relay <input name="key" type="password" autocomplete="off"></label>
  <p id="problem" role="alert"></p><button>Sign in</button>
  <p class="note">Kept for this tab only. The relay's access key is in its configuration, or in what it printed when it
    started.</p>
</form></dialog>
<dialog id="detail" aria-labelledby="outcome"><h2 id="outcome"></h2><dl id="facts"></dl>
  <h2>Attempts</h2><ol id="attempts"></ol><form method="dialog"><button>Close</button></form></dialog>
<script>
"use strict";
// Users, models, paths and errors are named by strangers: they become text (textContent, append) and nothing else.

// ---- figures ----

const unknown = (value) => value === null || value === undefined;
const figure = (write) => (value) => unknown(value) ? "—" : write(value);
const count = figure(new Intl.NumberFormat("en").format);
const short = figure(new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format);
const fixed = (value, digits) => value?.toFixed(digits) ?? "";
const scaled = (value, size) => unknown(value) ? null : value / size;
const bytes = (value) => short(value).replace(/[A-Z]?$/, " $&B");
const several = (number, thing) => `${count(number)} ${thing}${number === 1 ? "" : "s"}`;
const percent = (part) => `${Math.round(part * 100)} %`;
const dollars = figure((value) => `$${value < 1000 ? fixed(value, 2) : count(Math.round(value))}`);
const UNITS = [[0.1, 0.001, "ms"], [10, 1, "s"], [120, 1, "s"], [7200, 60, "min"], [Infinity, 3600, "h"]];
const duration = figure((seconds) => {
  const [limit, size, unit] = UNITS.find(([limit]) => seconds < limit);
  return `${fixed(seconds / size, limit === 10 && seconds % 1 ? 1 : 0)} ${unit}`;
});

// The time of day of what is near, the day of what is not; in the reader's zone.
const clock = (parts, format = new Intl.DateTimeFormat("en-GB", parts)) => (seconds) => format.format(seconds * 1000);
const toHour = clock({ hour: "2-digit", minute: "2-digit" }), toSecond = clock({ timeStyle: "medium" });
const toDay = clock({ day: "numeric", month: "short" });
const hour = (seconds) => Math.abs(seconds - now()) < 24 * 3600 ? toHour(seconds) : toDay(seconds);
const moment = (seconds) =>
  toDay(seconds) === toDay(now()) ? toSecond(seconds) : `${toDay(seconds)}, ${toHour(seconds)}`;
const utc = (seconds) => new Date(seconds * 1000).toISOString().replace("T", " ").slice(0, 19) + " UTC";

// ---- elements ----

const $ = (id) => document.getElementById(id);
const DRAWN = ["svg", "g", "line", "rect", "text", "title"];

function element(tag, attributes, ...children) {
  const made = DRAWN.includes(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) :
    document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// A name that has its place in a line, whatever its length.
const brief = (name) => name.length > 64 ? `${name.slice(0, 63)}…` : name;

const on = (type, target, act, options) => target.addEventListener(type, act, options);
const once = (type, target) => new Promise((resolve) => on(type, target, resolve, { once: true }));
const narrow = matchMedia("(width <= 640px)");

// Shows a text or an element in a place, and leaves alone what is there already.
function put(parent, value) {
  const made = value instanceof Node ? value : new Text(value ?? "—");
  if (parent.firstChild?.isEqualNode(made)) return;
  parent.replaceChildren(made);
  parent.title = made.length > 12 ? made.data : "";
}

// Heads a table, and returns what shows items in it. Rows that stay keep their element, and so focus and selection.
// Columns are title, classes, width and content. Narrow screens have four columns, of which `half` takes two and `line`
// all; `bare` is shown without its title there, `extra` and `away` not at all. Roles are said, for CSS that turns rows
// into grids takes them away. `few` tells how many items are shown, and what a button calls the rest, which it shows.
function table(id, keyOf, toneOf, columns, few = () => [8, "more"]) {
  const body = $(id), section = body.closest("section"), ariaLabel = section.querySelector("h2").textContent;
  Object.assign(body.parentNode, { role: "table", ariaLabel });
  body.parentNode.createTHead().insertRow().append(...columns.map(([title, kind, width]) =>
    element("th", { class: kind, width, scope: "col" }, title)));
  const newRow = () => element("tr", { role: "row" }, ...columns.map(([title, kind]) =>
    element("td", { class: kind, role: "cell", "data-title": title })));
  const rest = section.appendChild(element("button", { class: "plain note", type: "button" }));
  let shown = new Map(), isAll = false;
  on("click", rest, () => {
    isAll = !isAll;
    draw();
  });
  return (all) => {
    const before = shown, [most, words] = few(all);
    rest.hidden = all.length < most + 2;
    rest.ariaExpanded = isAll;
    put(rest, isAll ? "▴ fewer" : `▾ ${count(all.length - most)} ${words}`);
    const items = isAll || rest.hidden ? all : all.slice(0, most);
    shown = new Map(items.map((item) => [keyOf(item), before.get(keyOf(item)) ?? newRow()]));
    for (const [key, row] of before) if (!shown.has(key)) row.remove();
    items.forEach((item, index) => {
      const row = shown.get(keyOf(item));
      if (body.children[index] !== row) body.insertBefore(row, body.children[index] ?? null);
      row.dataset.tone = toneOf(item);
      columns.forEach(([, , , content], column) => put(row.cells[column], content(item)));
    });
  };
}

// A text that, when pressed, shows the requests that it stands for. "(other)" stands for several names, and none.
const OTHER = "(other)";
const choice = (filter, value, text = value) => value === OTHER ? value : element("button",
  { class: "plain", title: `${text}: show the requests`, "data-filter": filter, "data-value": value }, brief(text));

// A bar for each limit, of which a part is used, with words.
function gauges(limits) {
  const made = limits.map(([used, words]) => {
    const tone = used >= 0.95 ? "bad" : used >= 0.8 ? "warn" : "", width = `${Math.min(used, 1) * 100}%`;
    const bar = element("svg", { "aria-hidden": true }, element("rect", { width, height: "100%" }));
    return element("span", { class: "gauge", "data-tone": tone }, bar, words);
  });
  return made.length ? element("div", { class: "gauges" }, ...made) : "";
}

// ---- the tables ----

const STATES = {
  ok: ["good", "● ok"], echo: ["good", "● built in"], client: ["", "◇ the client's"], missing: ["", "○ no key: "],
  cooling: ["warn", "◐ "], failing: ["warn", "▲ "], refused: ["bad", "✕ "],
  reading: ["", "↥ reading"], waiting: ["", "◌ waiting"], retrying: ["warn", "↻ retrying"],
  streaming: ["good", "▸ streaming"],
};
const LIMITS = {
  unified_5h: "5-hour limit", unified_7d: "7-day limit", usd_per_day: "today", usd_per_month: "this month",
  tokens_per_day: "tokens today", requests_per_minute: "requests a minute",
};
const nameOf = ({ limit }) => LIMITS[limit] ?? limit.replaceAll("_", " ");
const MEANINGS = {
  401: "key refused", 402: "no credit", 403: "forbidden", 404: "not found", 429: "rate limit", 529: "overloaded",
  unreachable: "no connection", broken: "broken off", silent: "no answer",
};
const place = ({ provider, key }) => key ? `${provider} / ${key}` : provider || "—";
const route = ({ model, sent }) => sent && sent !== model ? `${model} → ${sent}` : model || "—";
const keyOf = ({ provider, key }) => `${provider}/${key ?? ""}`;
const failed = (row) => row.status >= 400 || Boolean(row.error && row.error !== "client_gone");

// What an attempt met, a status or a word, with what that means.
function met(what) {
  const meaning = MEANINGS[what] ?? (/^5/.test(what) ? "error" : "");
  return /^[45]/.test(what) ? `${what} ${meaning}`.trim() : meaning || what;
}

const sign = (row) => `${failed(row) ? "✕" : row.complete ? "✓" : "◌"} ${row.status || "—"}`;
const outcome = ({ status, error }) =>
  `${status || "no answer"} ${(error === "client_gone" ? "client left" : error ?? "").replace("upstream:", "")}`
    .replaceAll("_", " ").trim();

// What each attempt met. Those that failed are told as PROVIDER/KEY:WHAT, with spaces between.
function attempts(row) {
  const tried = [...(row.tried ?? "").matchAll(/(\S.*?):(\S+)(?: |$)/g)].map(([, key, what]) =>
    `${key.replace("/", " / ")}: ${met(what)}`);
  return tried.length < row.attempts ? [...tried, `${place(row)}: ${outcome(row)}`] : tried;
}

const why = (row) => row.attempts ? `${attempts(row).join(", then ")}; the client got ${row.status || "nothing"}` :
  `the relay answered ${outcome(row)}`;

const toneOf = (one) => STATES[one.state]?.[0] ?? "";
const signOf = (one) => STATES[one.state]?.[1] ?? one.state;
const isTroubled = (key) => ["warn", "bad"].includes(toneOf(key));
const valid = ({ limits = [] }) => limits.filter(({ reset }) => unknown(reset) || reset > now());
const spentLimit = (key) => valid(key).find(({ used, reset }) => used >= 1 && reset);

// What is wrong with a key, and until when; in `exact` words, or in such as don't change while it lasts.
function trouble(key, exact) {
  const limit = spentLimit(key), left = key.until - now();
  if (key.state === "failing") return `last attempt failed at ${hour(key.failed[0])} (${met(key.failed[1])})`;
  const back = exact && left < 120 ? `for ${duration(Math.max(0, Math.ceil(left)))}` : `until ${hour(key.until + 59)}`;
  return (limit ? `${nameOf(limit)} used up until ${hour(limit.reset)}` : `${met(key.why)}, avoided ${back}`) +
    (key.models ? ` (${key.models.map(brief).join(", ")})` : "");
}

const keyState = (key) => signOf(key) + (isTroubled(key) ? trouble(key, true) : key.state === "missing" ? key.why : "");

// What the last response left of a key's limits; of those that have begun anew since, nothing is known.
function headroom(key) {
  if (!valid(key).length && !["missing", "echo", "client"].includes(key.state)) return "limits not told";
  return gauges(valid(key).map((limit) => [limit.used, `${percent(limit.used)} of ` +
    `${limit.of ? short(limit.of) : "the"} ${nameOf(limit)}${limit.reset ? ` until ${hour(limit.reset)}` : ""}`]));
}

function usedOf(budget) {
  const amount = (value) => budget.limit.startsWith("usd") ? dollars(value).replace(".00", "") : short(value);
  return `${amount(budget.used)} of ${amount(budget.of)} ${nameOf(budget)}`;
}

const budgets = ({ user }) => gauges(view.budgets.filter((budget) => budget.user === user).map((budget) =>
  [budget.used / budget.of, `${budget.used < budget.of ? "" : "✕ "}${usedOf(budget)}`]));

// What went into caches, for any time; and what was read anew. What came from caches is told apart.
const written = ({ cache_write, cache_write_long }) => (cache_write ?? 0) + (cache_write_long ?? 0);
const tokensIn = (row) => unknown(row.input) ? null : row.input + written(row);

// Tokens a second of the answers that told theirs; the others took as long. What failed is taken to have cost no time.
function speed({ requests, errors, untold, output, seconds, ttfb }) {
  const good = requests - errors, streamed = seconds * requests - ttfb * good;
  return good > untold && output && streamed > 0 ? fixed(output / (good - untold) * good / streamed, 0) : "—";
}

// What was spent; `unpriced` if there is no price for a part of it.
const cost = ({ usd, unpriced }) => unknown(usd) ? (unpriced ? "no price" : "—") :
  `${unpriced ? "at least " : ""}${dollars(usd)}`;

const timeOf = ({ at, request }) =>
  element("button", { class: "plain", title: `${utc(at)}: show all of it`, "data-request": request }, moment(at));

const showKeys = table("keys", keyOf, toneOf, [
  ["Provider / key", "half bare name", "", (one) => choice("key", keyOf(one), place(one))],
  ["State", "tone line bare name", "", keyState],
  ["Attempts", "num away", "", (one) => count(one.requests)],
  ["Failed", "num away", "", (one) => count(one.errors)],
  ["Last failure", "away", "", (one) => one.failed ? `${hour(one.failed[0])}, ${one.failed[1]}` : "—"],
  ["Used of its limits", "line bare name", "38%", headroom],
], (keys) => narrow.matches ? [keys.filter(isTroubled).length, "keys ok"] : [12, "more"]);

const showRunning = table("running", (run) => run.request, toneOf, [
  ["User", "others bare name", "", (run) => brief(run.user)],
  ["State", "tone away", "", (run) => signOf(run) + (run.attempts > 1 ? `, try ${run.attempts}` : "")],
  ["Model", "bare name", "", (run) => brief(route(run))],
  ["Provider / key", "away name", "", place],
  ["For", "num bare", "", (run) => duration(now() - run.since)],
  ["First byte", "num away", "", (run) => duration(run.ttfb)],
  ["Bytes", "num extra", "", (run) => bytes(run.bytes)],
]);

const CONSUMED = [
  ["Tokens in", "num", "", (sum) => short(tokensIn(sum))],
  ["Cached", "num extra", "", (sum) => short(sum.cache_read)],
  ["Out", "num", "", (sum) => short(sum.output)],
  ["Cost ≈", "num", "", cost],
];

const showUsers = table("users", (sum) => sum.user, () => "", [
  ["User", "line bare name", "", (sum) => choice("user", sum.user)],
  ["Requests", "num", "", (sum) => count(sum.requests)],
  ...CONSUMED,
  ["Budget used", "line bare", "", budgets],
]);

// What no model has answered is summed up under no model's name.
const showModels = table("models", (sum) => sum.model, () => "", [
  ["Model", "line bare name", "", (sum) =>
    sum.model === OTHER && sum.requests === sum.errors ? "not answered" : choice("model", sum.model)],
  ["Requests", "num", "", (sum) => count(sum.requests)],
  ["Failed", "num away", "", (sum) => count(sum.errors)],
  ["First byte", "num away", "", (sum) => sum.model === OTHER ? "—" : duration(sum.ttfb)],
  ["Out/s ≈", "num extra", "", speed],
  ...CONSUMED,
]);

// The figures of a request that was answered.
const told = (write) => (row) => row.status >= 400 ? "" : write(row);
const toneOfRow = (row) => failed(row) ? "bad" : row.complete ? "good" : "warn";
const showRows = table("rows", (row) => row.request, toneOfRow, [
  ["Ended", "half bare", "9%", timeOf],
  ["Status", "tone half bare", "8%", (row) => sign(row) + (row.error === "client_gone" ? " client left" : "")],
  ["User", "others half bare", "9%", (row) => row.user],
  ["Model", "half bare", "19%", route],
  ["Provider / key", "line bare why", "19%", (row) =>
    failed(row) ? element("span", { class: "cut", title: why(row) }, why(row)) : place(row)],
  ["Tries", "num extra", "4%", told((row) => count(row.attempts))],
  ["First, s", "num", "5%", told((row) => fixed(row.ttfb, 2))],
  ["Time, s", "num", "5%", told((row) => fixed(row.seconds, 2))],
  ["In", "num extra", "5%", told((row) => count(tokensIn(row)))],
  ["Cached", "num extra", "6%", told((row) => count(row.cache_read))],
  ["Out", "num", "6%", told((row) => unknown(row.output) ? "not told" : count(row.output))],
  ["Cost ≈ $", "num", "5%", told((row) => row.output && unknown(row.usd) ? "no price" : fixed(row.usd, 4))],
], (items) => [items.length, ""]);

// All that is known of a request, in a dialog.
function showDetail(row) {
  const caches = unknown(row.input) ? "" : `, ${count(row.cache_read)} from the cache, ${count(written(row))} into it`;
  const facts = {
    Ended: `${moment(row.at)} (${utc(row.at)})`, User: row.user, Path: row.path, Model: route(row),
    Error: row.error || "—", "Whole answer": row.complete ? "yes" : "no",
    "First byte": duration(row.ttfb), Duration: duration(row.seconds),
    "Tokens in": count(row.input) + caches, "Tokens out": count(row.output), Tier: row.tier || "standard",
    Cost: unknown(row.usd) ? "not known: no price, or no tokens told" : `≈ $${fixed(row.usd, 6)}`, Id: row.request,
  };
  put($("outcome"), `${sign(row)[0]} ${outcome(row)}`);
  $("facts").replaceChildren(
    ...Object.entries(facts).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
  $("attempts").replaceChildren(...attempts(row).map((attempt) => element("li", {}, attempt)));
  $("detail").showModal();
}

// ---- above the tables ----

// Since when attempts at keys are counted: since the previous hour began, or the relay.
const recently = () => Math.max(Math.floor(now() / 3600) * 3600 - 3600, view.since);

// What is wrong, each as tone and words. The times are such as stay: a screen reader is told of what happens, not that
// time goes by.
const LATELY = 600;
function problems() {
  const late = merged(recent, failure ? [failure] : [], (row) => row.request).filter((row) =>
    failed(row) && row.at > now() - LATELY), last = toHour(failure?.at ?? 0);
  const keys = view.keys.filter((key) => isTroubled(key) && (key.state !== "failing" || key.failed[0] > recently()));
  const spent = view.budgets.filter(({ used, of, reset }) => reset && used >= 0.95 * of);
  return [
    [view.unwritten, "bad", `the ledger can't be written, ${several(view.unwritten, "request")} to be kept there`],
    [usageFault, "bad", `the sums can't be shown: ${usageFault}`],
    [late.length, "bad", late.length === 1 ? `a request failed at ${last}` :
      `${count(late.length)} requests failed in ten minutes, the last at ${last}`],
    ...keys.map((key) => [true, toneOf(key), `${place(key)}: ${trouble(key)}`]),
    ...spent.map((budget) => [true, budget.used < budget.of ? "warn" : "bad",
      `${view.admin ? `${brief(budget.user)} has` : "you have"} spent ${usedOf(budget)}` +
      (budget.used < budget.of ? "" : `, and can go on at ${hour(budget.reset)}`)]),
  ].filter(([applies]) => applies);
}

// How everything is: tone, a word or two, and the rest of the sentence.
function situation() {
  const { tone } = $("link").dataset;
  if (tone === "warn") return [tone, "◌ Signed out", ""];
  if (tone !== "good") return [tone, "▲ No connection", view ? `what is shown is of ${toSecond(view.now)}` : ""];
  const wrong = problems(), keys = view.keys.filter(({ state }) => state === "ok").length;
  const words = wrong.slice(0, 4).map(([, , words]) => words);
  if (wrong.length > 4) words.push(`${count(wrong.length - 4)} more`);
  return wrong.length ? [wrong.some(([, tone]) => tone === "bad") ? "bad" : "warn",
    `▲ ${several(wrong.length, "problem")}`, words.join("; ")] :
    ["good", "● All well", `${keys ? `${several(keys, "key")} ok, ` : ""}no request failed in the last ten minutes`];
}

// The line that a screen reader is told, too: while it is as good or bad as it was, at most one in ten seconds.
let saidAt = -Infinity;
function drawStatus() {
  const [tone, lead, rest] = situation(), line = $("status");
  const words = element("span", { "data-tone": tone }, element("strong", { class: "tone" }, lead), rest && `: ${rest}`);
  const isSame = line.firstElementChild?.dataset.tone === tone && performance.now() < saidAt + 10000;
  if (isSame || line.firstElementChild?.isEqualNode(words)) return;
  saidAt = performance.now();
  put(line, words);
}

function drawTiles() {
  const oldest = now() - Math.min(now(), ...view.running.map((run) => run.since));
  const { total = {}, users = [], models = [], priced } = usage ?? {}, { requests = 0, errors = 0 } = total;
  const days = `${$("days").value && "in "}${$("days").selectedOptions[0].text}`;
  const period = view.ledger ? days : `since ${moment(view.since)}`;
  const unpriced = models.filter((sum) => sum.unpriced).map((sum) => brief(sum.model));
  const spenders = users.filter((sum) => sum.usd || sum.unpriced);
  const spent = [
    ...(view.admin ? spenders.slice(0, 4).map((sum) => `${brief(sum.user)} ${cost(sum)}`) : view.budgets.map(usedOf)),
    ...(spenders.length > 4 ? [`${count(spenders.length - 4)} more`] : []),
    ...(unpriced.length ? [`no price for ${unpriced.length > 2 ? `${count(unpriced.length)} models` :
      unpriced.join(", ")}`] : [])];
  const spentInAll = cost({ ...total, unpriced: unpriced.length });
  const tiles = [
    [`${view.admin ? "Running" : "Yours running"} now`, count(view.active),
      view.active ? `oldest for ${duration(oldest)}` : "nothing"],
    ["Last minute", `${count(view.minute.requests)} req`, `${view.minute.errors || "none"} failed`],
    [`Failed ${period}`, errors ? choice("errors", "1", count(errors)) : "0",
      `${errors ? `${Number((errors / requests * 100).toPrecision(2))} % ` : ""}of ${count(requests)}`,
      failure?.at > now() - LATELY ? "bad" : ""],
    ["First byte, median", duration(view.ttfb?.[0]),
      view.ttfb ? `95 % within ${duration(view.ttfb[1])}` : "no recent answer"],
    [`Tokens ${period}`, `${short(tokensIn(total))} in · ${short(total.output)} out`,
      `${short(total.cache_read)} more from caches` +
      (total.untold ? ` · not told in ${several(total.untold, "answer")}` : "")],
    [`${view.admin ? "Cost" : "Your cost"} ${period}`, `${spentInAll.startsWith("$") ? "≈ " : ""}${spentInAll}`,
      unknown(priced) ? "no prices are set" : spent.join(" · ")],
  ];
  tiles.forEach(([label, value, note, tone = ""], index) => {
    const tile = $("tiles").children[index] ?? $("tiles").appendChild(element("div", { class: "panel" },
      element("dt", {}), element("dd", { class: "tone" }), element("dd", { class: "note" })));
    [label, value, note].forEach((content, part) => put(tile.children[part], content));
    tile.dataset.tone = tone;
  });
  for (const title of document.querySelectorAll(".period")) put(title, period);
  document.title = view.active ? `${count(view.active)} running · MonoRelay` : "MonoRelay";
}

function drawFailure() {
  const panel = $("failure").lastElementChild;
  if (!failure) return put(panel, view.ledger ? "none is known" : `none since ${moment(view.since)}`);
  const words = [sign(failure), brief(failure.user), brief(route(failure)), why(failure)];
  const told = words.map((text, index) => element("span", { class: index ? "" : "tone" }, text));
  const tone = failure.at < now() - LATELY ? "" : "bad";
  put(panel, element("div", { "data-tone": tone }, timeOf(failure), ...told));
}

// What its owner could set next, with the words for relay.json.
function drawAdvice() {
  const missing = view.keys.filter((one) => one.state === "missing").map((one) => one.why).join(", or ");
  const isServed = view.keys.some((one) => !["echo", "missing"].includes(one.state));
  const advice = [
    [missing && !isServed, "Only echo answers so far. For the models of a provider: ", missing],
    [usage && unknown(usage.priced), "No cost is known. Set in relay.json: ", '"prices": "model_prices.json"'],
    [!view.ledger, "All of this ends with the relay. Set in relay.json: ", '"ledger": { "path": "usage.db" }'],
  ].filter(([applies]) => applies && view.admin);
  $("advice").hidden = !advice.length;
  const items = advice.map(([, words, setting]) => element("li", {}, words, element("code", {}, setting)));
  put($("advice").lastElementChild, element("ol", {}, ...items));
}

// The bars of the last 24 hours: requests, and on top of them the failed ones with their number.
function drawHours() {
  const told = new Map(view.hours.map((row) => [row[0], row])), first = Math.floor(now() / 3600) - 23;
  const untold = (one) => (one + 1) * 3600 > view.since ? [one, 0, 0] : [one, null, null];
  const hours = Array.from({ length: 24 }, (_, index) => told.get(first + index) ?? untold(first + index));
  const half = Math.max(2, ...hours.map(([, requests]) => requests / 2)), unit = 10 ** Math.floor(Math.log10(half));
  const most = 2 * Math.ceil(half / unit) * unit;
  const high = (value) => `${value / most * 100}%`, wide = (value) => `${value / 24 * 100}%`;
  const text = (x, value, dy, words, kind = "") =>
    element("text", { class: kind, x, y: high(most - value), dy }, words);
  const lines = [most, most / 2, 0].flatMap((value) => [
    element("line", { x2: "100%", y1: high(most - value), y2: high(most - value) }),
    text("-.6em", value, ".35em", short(value), "scale")]);
  const bars = hours.map(([one, requests, errors, , , , cost], index) => {
    const start = toHour(one * 3600), middle = wide(index + 0.5);
    const words = unknown(requests) ? `${start}: before the relay's start` :
      `${start}: ${count(requests)} requests, ${count(errors)} failed, ≈ ${dollars(scaled(cost, 1e9))}`;
    const block = (kind, top, height) => element("rect",
      { class: kind, x: wide(index + 0.12), width: wide(0.76), y: high(most - top), height: high(height) });
    return element("g", {}, element("title", {}, words), block("all", most, most), block("ok", requests, requests),
      ...(errors ? [block("failed", requests, errors), text(middle, requests, "-.4em", short(errors), "failed")] : []),
      ...(index % 4 === 1 ? [text(middle, 0, "1.5em", start)] : []));
  });
  const label = `${count(hours.reduce((sum, [, requests]) => sum + requests, 0))} requests in 24 hours`;
  const begun = hours.find(([, requests]) => !unknown(requests))?.[0] ?? first;
  put($("charted"), begun > first ? `since ${toHour(begun * 3600)}` : "last 24 hours");
  put($("chart"), element("svg", { role: "img", "aria-label": label }, ...lines, ...bars));
}

// ---- the last requests: an array of all that were loaded, and elements for those in sight ----

const PAGE_ROWS = 200, MOST_ROWS = 50000, RECENT_ROWS = 500;
const ENDED = ("id at user model sent provider key status ttfb seconds input cache_read output cost cache_write " +
  "attempts tried error path stream complete request tier").split(" ");
const RUNNING = "request user model sent provider key state seconds ttfb bytes attempts".split(" ");
const known = new Map();
let rows = [], next, loading = null;  // next: what the page behind them is asked by, null if there is none
let recent = [], failure = null;  // whatever the filters: what ended while this page looked on, and what failed last

const named = (names) => (list) => Object.fromEntries(names.map((name, index) => [name, list[index]]));
const withCost = (row) => ({ ...row, usd: scaled(row.cost, 1e9) });
const fromLive = (list) => withCost(named(ENDED)(list));
const fromLedger = (row) => withCost({
  ...row, at: row.at / 1000, ttfb: scaled(row.ttfb, 1000), seconds: scaled(row.duration, 1000),
});

const matches = (row) => (!filters.user || filters.user === row.user) && (!filters.key || filters.key === keyOf(row)) &&
  (!filters.model || [row.model, row.sent].includes(filters.model)) && (!filters.errors || failed(row));

// Takes in what is new and passes the filters; what is being read stays where it is.
function addRows(found) {
  const newest = rows[0];
  for (const row of found) if (matches(row) && !known.has(row.request)) known.set(row.request, row);
  rows = [...known.values()].sort((one, other) => other.at - one.at);
  if (passed() > 0) scroller().scrollTop += Math.max(0, rows.indexOf(newest)) * rowHeight();
}

function forgetRows() {
  known.clear();
  [rows, next] = [[], undefined];
}

// Asks for the newest rows, or for older ones than there are; again in five seconds if that fails.
async function loadRows(older = false) {
  loading?.abort();
  const mine = loading = new AbortController();
  try {
    const query = queryOf({ limit: PAGE_ROWS, before: older && next, ...filters });
    const page = await get(`api/requests?${query}`, { signal: mine.signal }), found = page.rows.map(fromLedger);
    if (mine !== loading) return;
    // After a gap the newest page joins the rows if it reaches them, and else replaces them.
    if (!older && !found.some((row) => known.has(row.request))) forgetRows();
    if (older || next === undefined) next = page.next;
    addRows(older ? found : [...found, ...recent]);
    put($("none"), rows.length ? "" : emptyWords());
  } catch (error) {
    if (mine !== loading) return;
    put($("none"), `The requests can't be shown: ${error.message}`);
    await pause(5);
    if (mine !== loading) return;
    if (!older) next = undefined;
  }
  loading = null;
  draw();
}

function emptyWords() {
  if (Object.values(filters).some(Boolean)) return "No request is like that.";
  const body = '{"model": "echo", "max_tokens": 64, "messages": [{"role": "user", "content": "Hello"}]}';
  const command = `curl ${new URL("v1/messages", location)} -H "x-api-key: YOUR KEY" ` +
    `-H "content-type: application/json" -d '${body}'`;
  return element("span", {}, "No request yet. Try one: ", element("code", {}, command));
}

// On narrow screens it is the page that scrolls the rows.
const scroller = () => narrow.matches ? document.documentElement : $("box");
const passed = () => narrow.matches ? Math.max(0, -$("box").getBoundingClientRect().top) : $("box").scrollTop;
const rowHeight = () => $("rows").firstChild?.getBoundingClientRect().height || 26;

function drawRows() {
  const list = $("rows").parentNode, height = rowHeight(), isAll = next === null;
  const first = Math.min(Math.max(0, Math.floor(passed() / height) - 10), rows.length);
  const end = Math.min(rows.length, Math.ceil((passed() + scroller().clientHeight) / height) + 10);
  list.style.margin = `${first * height}px 0 ${(rows.length - end) * height}px`;
  list.ariaRowCount = isAll ? rows.length + 1 : -1;
  showRows(rows.slice(first, end));
  [...$("rows").rows].forEach((row, index) => {
    const [before, item] = [rows[first + index - 1], rows[first + index]];
    row.ariaRowIndex = first + index + 2;
    row.classList.toggle("day", Boolean(before) && toDay(before.at) !== toDay(item.at));
  });
  put($("loaded"), rows.length ? `${count(rows.length)} loaded, ${isAll ? "all there are" : "more by scrolling"}` : "");
  if (!loading && !isAll && end > rows.length - PAGE_ROWS / 2) loadRows(next !== undefined);
}

// ---- filters: they stand in the address, to be kept, shared and gone back to ----

let filters = {};
const queryOf = (values) => new URLSearchParams(Object.entries(values).filter(([, value]) => value));

function readAddress() {
  const query = new URLSearchParams(location.search);
  filters = Object.fromEntries(["user", "model", "key", "errors"].map((name) => [name, query.get(name) ?? ""]));
  $("filters").elements.errors.checked = Boolean(filters.errors);
  $("clear").hidden = !Object.values(filters).some(Boolean);
  $("days").value = ["7", "30"].find((days) => days === query.get("days")) ?? "";
  forgetRows();
  $("box").scrollTop = 0;
  if (view) reload();
}

function setFilters(changes) {
  const query = queryOf({ days: $("days").value, ...filters, ...changes });
  history.pushState(null, "", query.size ? `?${query}` : location.pathname);
  readAddress();
}

// What can be chosen: what there are sums of, and what the address names.
function drawChoices() {
  const names = (by, of) => (usage?.[of] ?? []).map((sum) => sum[by]).filter((name) => name !== OTHER);
  const offered = { user: names("user", "users"), model: names("model", "models"), key: view.keys.map(keyOf) };
  for (const [name, values] of Object.entries(offered)) {
    const select = $("filters").elements[name], wanted = [...new Set(["", ...values, filters[name]])];
    if (select === document.activeElement && select.value === filters[name]) continue;
    select.replaceChildren(...wanted.map((value) => new Option(value || `all ${name}s`, value)));
    select.value = filters[name];
  }
}

// ---- sums, asked for at most once in ten seconds ----

let usage = null, usageAt = 0, usageStale = false, usageDay = "", usageQuery = "", usageFault = "";
const day = (ago) => utc(now() - 86400 * ago).slice(0, 10);

async function loadUsage() {
  // What ended just now may not be in the ledger yet.
  [usageAt, usageStale, usageDay] = [performance.now(), recent.at(-1)?.at > now() - 3, day(0)];
  // Without a ledger there are only the sums since the start.
  const query = usageQuery = view.ledger ? `from=${day(($("days").value || 1) - 1)}&to=${day(0)}&` : "";
  try {
    const [users, models, parts] = await Promise.all(["user", "model", "user,model"].map((by) =>
      get(`api/usage?${query}by=${by}`)));
    const unpriced = parts.rows.filter(({ usd, output }) => unknown(usd) && output);
    const marked = ({ rows }, by) => rows.map((sum) =>
      ({ ...sum, unpriced: unpriced.some((part) => part[by] === sum[by]) }));
    if (query === usageQuery) usage = { ...models, users: marked(users, "user"), models: marked(models, "model") };
    usageFault = "";
    drawChoices();
  } catch (error) {
    [usageStale, usageFault] = [true, error.message];
  }
  draw();
}

// ---- drawing: when something comes, and each second; never in a hidden tab, which gets no frames ----

let view = null, frame = 0, timer = 0;
const now = () => performance.now() / 1000 + view.offset;

function draw() {
  clearTimeout(timer);
  timer = setTimeout(draw, 1000);
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    if (view) drawAll();
  });
}

function drawAll() {
  for (const key of view.keys) key.state = stateOf(key);
  drawStatus();
  drawTiles();
  drawAdvice();
  drawFailure();
  drawHours();
  showKeys([...view.keys].sort((one, other) => isTroubled(other) - isTroubled(one)));
  put($("counted"), `attempts since ${hour(recently())}`);
  showRunning(view.running);
  put($("active"), `${count(view.active)} now` +
    (view.active > view.running.length ? `, the oldest ${view.running.length} here` : ""));
  showUsers(usage?.users ?? []);
  showModels(usage?.models ?? []);
  drawRows();
  if ((usageStale || usageDay !== day(0)) && performance.now() - usageAt > 10000) loadUsage();
}

// ---- the live stream ----

const merged = (old, changed = [], key) => [...new Map([...old, ...changed].map((one) => [key(one), one])).values()];

// How a key is. One that cools because the provider refuses it, or its account has no credit, needs a person; one that
// is ready may have spent a limit, or have failed when it was last tried, unless that was about the request.
function stateOf(key) {
  if (key.told === "cooling") return ["401", "402"].includes(String(key.why)) ? "refused" : "cooling";
  if (key.told !== "ok") return key.told;
  if (spentLimit(key)?.reset > now() + 60) return "cooling";
  return key.failed?.[0] > key.answered && !/^4(?!0[123]|29)/.test(key.failed[1]) ? "failing" : "ok";
}

function take(event, data) {
  const ended = (data.ended ?? []).map(fromLive), errors = ended.filter(failed);
  const running = data.running?.map(named(RUNNING)).map((run) => ({ ...run, since: data.now - run.seconds }));
  if (event === "state") view = { running: [], keys: [], hours: [], budgets: [] };
  view = {
    ...view, ...data, offset: data.now - performance.now() / 1000, running: running ?? view.running,
    keys: merged(view.keys, data.keys?.map((key) => ({ ...key, told: key.state, until: data.now + key.for })), keyOf),
    hours: merged(view.hours, data.hours, ([one]) => one),
    budgets: merged(view.budgets, data.budgets, (budget) => `${budget.limit} ${budget.user}`),
  };
  recent = merged(recent, ended, (row) => row.request).slice(-RECENT_ROWS);
  failure = errors.at(-1) ?? failure;
  usageStale ||= ended.length > 0;
  if (event === "state") {
    begin();
  } else {
    addRows(ended);
    if (rows.length) put($("none"), "");
  }
  if (rows.length > MOST_ROWS) readAddress();
  draw();
}

async function begin() {
  document.body.classList.toggle("own", !view.admin);
  document.querySelector("main").hidden = false;
  $("days").hidden = !view.ledger;
  put($("where"), `${view.version} · ${location.host}`);
  put($("whose"), view.admin ? "Users" : "You");
  reload();
  const { rows: [last] } = await get("api/requests?errors=1&limit=1").catch(() => ({ rows: [] }));
  if (last && !(failure?.at > last.at / 1000)) failure = fromLedger(last);
}

function reload() {
  drawChoices();
  loadRows();
  loadUsage();
}

let connection = new AbortController(), lastId = "", patience = 0;

// Takes what comes as a sign of life: a stream without any for 40 seconds is given up.
function hear() {
  clearTimeout(patience);
  patience = setTimeout(() => connection.abort(new Error("nothing came for 40 s")), 40000);
}

// Reads the stream to its end. Raises what fetch() does.
async function follow() {
  const { signal } = connection = new AbortController();
  hear();
  const response = await ask("api/live", { signal, headers: lastId ? { "last-event-id": lastId } : {} });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (let read = await reader.read(); !read.done; read = await reader.read()) {
    hear();
    const events = (text + read.value).split("\n\n");
    text = events.pop();
    for (const event of events) {
      const fields = Object.fromEntries(event.split("\n").map((line) => line.split(/: (.*)/s, 2)));
      if (fields.data) take(fields.event, JSON.parse(fields.data));
      lastId = fields.id ?? lastId;
    }
    if (view) tell("good", "●", `live, ${toSecond(now())}`);
  }
}

const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, seconds * 1000));

async function live() {
  let wait = 1;
  for (;;) {
    if (document.hidden) await once("visibilitychange", document);
    const why = await follow().then(() => "the relay ended it", (error) => error.message);
    if (document.hidden) continue;
    wait = $("link").dataset.tone === "good" ? 1 : Math.min(wait * 2, 30);
    tell("bad", "▲", `no connection, again in ${wait} s (${why})`);
    await pause(wait);
  }
}

function tell(tone, sign, words) {
  if ($("link").dataset.tone !== tone) saidAt = -Infinity;
  $("link").dataset.tone = tone;
  put($("sign"), sign);
  put($("words"), words);
  if (tone !== "good") drawStatus();
}

// ---- who is asking: a token in this tab's memory, sent in a header ----

let session = JSON.parse(sessionStorage.getItem("monorelay")), signingIn = null;

const root = location.pathname.endsWith("/") ? "../" : "";  // as /dashboard/ is this page, too

// A response that is no error. Raises Error with the relay's words, and the status.
async function send(path, token, { headers, ...options } = {}) {
  const authorization = token ? { authorization: `Bearer ${token}` } : {};
  const asked = { cache: "no-store", ...options, headers: { ...headers, ...authorization } };
  const response = await fetch(root + path, asked);
  if (response.ok) return response;
  const told = await response.json().catch(() => null), { status } = response;
  throw Object.assign(new Error(told?.error?.message ?? `status ${status}`), { status });
}

async function post(path, value) {
  const options = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(value) };
  return (await send(path, null, options)).json();
}

// A response to whoever is signed in; where nobody is any more, asks for that first.
async function ask(path, options) {
  for (;;) {
    const used = session;
    try {
      if (used) return await send(path, used.token, options);
    } catch (error) {
      if (error.status !== 401) throw error;
    }
    if (used === session) await (signingIn ??= signIn().finally(() => { signingIn = null; }));
  }
}

const get = async (path, options) => (await ask(path, options)).json();

// Renews the session, or has a person sign in, over what is shown.
async function signIn() {
  const old = session;
  session = null;
  const renewed = old?.refresh && await post("api/auth/refresh", { refresh_token: old.refresh }).catch(() => null);
  if (renewed) return keep({ ...old, token: renewed.access_token, refresh: renewed.refresh_token });
  tell("warn", "◌", "signed out");
  put($("problem"), old ? "The sign-in has expired. Please sign in again." : "");
  while (!session) {
    $("signin").showModal();
    await once("close", $("signin"));
  }
  if (old && old.name !== session.name) location.reload();
}

// Takes what stands in the form for a password or a key, and tells the relay's words if it is none.
async function submitSignIn(form) {
  const { username, password, key } = Object.fromEntries(new FormData(form));
  put($("problem"), "");
  try {
    if (/[^ -~]/.test(key)) throw new Error("that is no key: it has letters beyond ASCII");
    const login = key ? { access_token: key.trim() } : await post("api/auth/login", { username, password });
    const me = await (await send("api/auth/me", login.access_token)).json();
    keep({ token: login.access_token, refresh: login.refresh_token, name: me.username });
    form.reset();
    $("signin").close();
  } catch (error) {
    put($("problem"), `✕ ${error.message}`);
  }
}

function keep(signedIn) {
  session = signedIn;
  sessionStorage.setItem("monorelay", JSON.stringify(session));
  put($("me"), session.name);
  $("leave").hidden = false;
}

// ---- what a person does ----

on("popstate", window, readAddress);
on("visibilitychange", document, () => document.hidden ? connection.abort() : draw());
for (const target of [$("box"), document]) on("scroll", target, () => requestAnimationFrame(drawRows));
on("change", $("days"), () => setFilters({}));
on("click", $("clear"), () => setFilters({ user: "", model: "", key: "", errors: "" }));
on("change", $("filters"), ({ target: { name, type, value, checked } }) =>
  setFilters({ [name]: type === "checkbox" ? (checked ? "1" : "") : value }));
on("submit", document, (event) => {
  if (event.target.method !== "dialog") event.preventDefault();
  if ($("signin").contains(event.target)) submitSignIn(event.target);
});
on("click", $("leave"), () => {
  sessionStorage.removeItem("monorelay");
  location.reload();
});
on("click", document, ({ target }) => {
  const pressed = target.closest("button") ?? target.closest("#rows tr")?.querySelector("button");
  const { filter, value, request } = pressed?.dataset ?? {};
  if (request) showDetail(known.get(request) ?? failure);
  if (!filter) return;
  setFilters({ [filter]: value });
  $("filters").scrollIntoView();
});

readAddress();
if (session) keep(session);
live();
</script>
</html>
"""


# What no browser may do with the page: guess its type, tell others where it was, keep it, open or embed it elsewhere.
PAGE_FIELDS = (
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cache-control", "no-store"),
    ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
)


@functools.lru_cache(maxsize=1)
def page_body() -> bytes:
    """PAGE as it is sent, the same object to all: they need no token, and may take their time."""
    return PAGE.encode("utf-8")


def dashboard_policy() -> str:
    """The value of `content-security-policy` that goes with PAGE (W3C CSP 3). It names the only script and style."""
    script, style = hash_of("script"), hash_of("style")
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    )


def hash_of(tag: str) -> str:
    """The one element of this kind in PAGE, as a source in a policy: the SHA-256 of what is between its tags."""
    content = PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


# ==== Command line ==================================================================================
#
# What each command does, what it warns of, and the options it takes. None needs a configuration file.


HELP = """usage: monorelay.py [COMMAND] [--config FILE] [--host HOST] [--port PORT]

One address for Claude Code, the Anthropic and OpenAI SDKs and curl. Without a command it serves.

commands:
  serve           serve until a signal says otherwise
  check           validate the configuration and print what would be served
  route MODEL     print where a request for a model would go, and why
  usage [FILE...] print what was used and what it cost, from the ledger or from several
  hash-password   read a password and print its hash for relay.json
  token USER      print a JWT for a user of relay.json

options:
  --config FILE   the configuration (default: ./relay.json, or the one beside monorelay.py)
  --host HOST     listen there instead of server.host
  --port PORT     listen there instead of server.port
  --expires TIME  how long a token is valid, such as 30d, 12h, 90m or 60s (default: 30d)
  --days NUMBER   of which days the usage is, up to today, in UTC (default: 7)
  --by COLUMNS    sum it up by some of user, model, provider, key and day (default: user,model)
  --csv, --json   print the usage as CSV or JSON, and not as a table
  --version       print the version
  --help          print this, or how a command is used

example:
  MONORELAY_ACCESS_KEY=try-me python3 monorelay.py --port 8788
"""


class UsageError(Exception):
    """The command line is wrong; the message says where."""


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Runs the command that the arguments name; the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # it may lack the characters of a name, on Windows above all
    try:
        return run_command(sys.argv[1:] if arguments is None else arguments)
    except UsageError as error:
        print(f"monorelay: {error}; see --help", file=sys.stderr)
        return 2
    except ConfigError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(f"monorelay: {system_problem(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        print(file=sys.stderr)
    return 1


def run_command(arguments: Sequence[str]) -> int:
    """Takes the command line apart and does what it says; the exit status. Raises UsageError."""
    options = (*OPTIONS, *FLAGS)
    try:
        given, words = getopt.gnu_getopt(arguments, "h", [*(f"{name}=" for name in OPTIONS), *FLAGS, "version", "help"])
    except getopt.GetoptError as error:
        meant = "" if error.opt in options else suggestion(f"--{error.opt}", [f"--{name}" for name in options])
        raise UsageError(f"{error.msg}{meant}") from None
    asked = dict(given)
    if "--help" in asked or "-h" in asked or words[:1] == ["help"]:
        print(help_text(words[-1] if words else ""), end="")
        return 0
    if "--version" in asked or words == ["version"]:
        print(f"MonoRelay {__version__}")
        return 0
    command, *operands = words or ["serve"]
    if command not in COMMANDS:
        alike = [other for other in COMMANDS if other[0] == command[:1]]
        meant = ", did you mean serve?" if command in ("start", "run", "up") else suggestion(command, alike)
        raise UsageError(f"there is no command {command[:LOG_VALUE_CHARACTERS]}{meant}")
    run, takes = COMMANDS[command]
    operand = OPERANDS.get(command)
    if command != "usage" and len(operands) != bool(operand):
        raise UsageError(f"{command} takes one {operand}" if operand else f"{command} takes nothing but options")
    return run(read_options(asked, command, takes), *operands)


def help_text(command: str) -> str:
    """How the program is used, or one command of it."""
    if command not in COMMANDS:
        return HELP
    takes = [f"--{name}" for name in COMMANDS[command][1]]
    lines = [line for line in HELP.splitlines() if line.startswith((f"  {command}", *(f"  {name} " for name in takes)))]
    options = "".join(f" [{line.split()[0]} {line.split()[1]}]" for line in lines[1:])
    operand = f" {OPERANDS[command]}" if command in OPERANDS else ""
    return "\n".join([f"usage: monorelay.py {command}{operand}{options}", "", *lines, ""])


def read_options(asked: Mapping[str, str], command: str, takes: Sequence[str]) -> JsonDict:
    """The options by their names without the dashes, each as its check returns it. Raises UsageError."""
    options = {}
    for option, value in asked.items():
        name = option[len("--") :]
        if name not in takes:
            raise UsageError(f"{command} takes no {option}")
        try:
            options[name] = name in FLAGS or OPTIONS[name](FromEnvironment(value))
        except ValueError as error:
            raise UsageError(f"{option} {error}: {value[:LOG_VALUE_CHARACTERS]!r}") from None
    return options


def lifetime(value: Any) -> int:
    """The seconds of a time such as 30d."""
    match = re.fullmatch(r"([1-9][0-9]{0,8})([smhd])", value)
    if not match:
        raise ValueError("must be a time such as 30d, 12h, 90m or 60s")
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def usage_columns(value: Any) -> tuple[str, ...]:
    """The columns to sum up by, of a list with commas."""
    columns, known = tuple(dict.fromkeys(value.replace(" ", "").split(","))), (*GROUPS, "day")
    for column in columns:
        if column not in known:
            raise ValueError(f"must be some of {', '.join(known)}{suggestion(column, known)}")
    return columns


def run_check(options: JsonDict) -> int:
    """Prints what would be served."""
    path = config_path(options)
    config = load_prices(load_config(path, options), path)
    print(f"{path or 'built-in configuration'}: fine")
    print("\n".join(describe_config(config)))
    for warning in file_warnings(path, config):
        print(f"warning: {warning}")
    return 0


def run_route(options: JsonDict, model: str) -> int:
    """Prints where a request for the model would go, and why; 1 if nowhere."""
    config = load_config(config_path(options), options)
    try:
        targets = resolve(config, model)
    except RelayError as error:
        print(f"{model}: {error.message}")
        return 1
    print("\n".join(route_reasons(config, model)))
    asked = for_one_credential([target for target in targets if target.provider.usable])
    for number, target in enumerate(targets, 1):
        provider = target.provider
        why = "a client's own key is for the first that takes one" if provider.usable else "it has no key"
        state = f"for {served_paths(provider)}" if target in asked else f"skipped, {why}"
        print(f"  {number}. {target.model} at {provider.name} ({provider.format}): {state}")
    return 0 if asked else 1


def served_paths(provider: Provider) -> str:
    """At which paths a provider serves chats, and how."""
    paths = {"anthropic": "/v1/messages", "openai": "/v1/chat/completions"}
    own = paths.pop(provider.chat_format)
    return f"{own}, and {paths.popitem()[1]} translated" if provider.translate else own


def route_reasons(config: Config, name: str, passed: tuple[str, ...] = ()) -> list[str]:
    """Which rules of relay.json lead from a model's name to its targets, a line each."""
    provider = split_provider(config, name)[1]
    if provider:
        return [f"{name}: names the provider {provider}"]
    alias, names = find_alias(config, name, passed)
    if alias:
        reasons = [f"{name}: is the alias {alias} -> {', '.join(names)}"]
        return reasons + [reason for other in names for reason in route_reasons(config, other, (*passed, alias))]
    for pattern, providers in config.routes.items():
        if matches(name, pattern):
            return [f"{name}: matches the route {pattern} -> {', '.join(providers)}"]
    if name.endswith(LONG_CONTEXT):
        return [f"{name}: is tried without {LONG_CONTEXT}", *route_reasons(config, name[: -len(LONG_CONTEXT)])]
    return [f"{name}: begins with the provider's name"]


def run_usage(options: JsonDict, *paths: str) -> int:
    """Prints what was used and what it cost. Several files are summed up. Raises OSError for one that can't tell."""
    by, days = options.get("by", ("user", "model")), options.get("days", 7)
    if "csv" in options and "json" in options:
        raise UsageError("usage prints --csv or --json")
    if not sqlite3:
        raise OSError(errno.ENOSYS, "this Python has no sqlite3", "ledger")
    today = int(time.time() // 86400)
    start = today - days + 1
    groups: dict[tuple[str, ...], Sums] = {}
    totals: dict[tuple[str, ...], Sums] = {}  # grouped by nothing, with what LEDGER_GROUPS leave out
    is_cut = False  # whether they do
    for path in paths or (configured_ledger(options),):
        if not os.path.exists(path):
            raise OSError(errno.ENOENT, "there is no ledger yet; a relay begins it with its first request", path)
        try:
            is_cut = add_usage(groups, path, by, start * 24, (today + 1) * 24) or is_cut
            add_usage(totals, path, (), start * 24, (today + 1) * 24)
        except (sqlite3.Error, ValueError) as error:
            raise OSError(errno.EIO, str(error), path) from None
    first, last = (windows(day * 86400)[0] for day in (start, today))
    rows = [usage_row(dict(zip(by, group)), sums) for group, sums in groups.items()]
    rows.sort(key=lambda row: (row.get("day", ""), -(row["usd"] or 0), -row["requests"]))
    total = usage_row({}, totals[()]) if totals else {}
    if "json" in options:
        about = {"from": first, "to": last, "by": by, **({"cut": True} if is_cut else {})}
        print(json.dumps({**about, "rows": rows, "total": total}, indent=2))
        return 0
    if "csv" in options:
        print_csv(rows, by)
    else:
        print("\n".join(usage_table(rows, total, by, f"from {first} to {last} (UTC)")))
    if is_cut:
        print("monorelay: only the dearest rows are told; ask for fewer columns with --by", file=sys.stderr)
    return 0


def configured_ledger(options: JsonDict) -> str:
    """The path of the ledger that relay.json names. Raises ConfigError if it names none."""
    path = config_path(options)
    config = load_config(path, options)
    if not config.ledger:
        name = config_name(path)
        raise ConfigError([f'{name}: there is no ledger; add "ledger": {{"path": "usage.db"}}, or name a file'])
    return config.ledger.path


def add_usage(groups: dict[tuple[str, ...], Sums], path: str, by: Sequence[str], since: int, until: int) -> bool:
    """Adds to the sums of each group what a ledger has from one hour up to another; whether LEDGER_GROUPS leave
    something out. Raises sqlite3.Error."""
    asked, is_cut = (path, since, until, [column for column in by if column != "day"], None), False
    # All days together may have too many groups.
    for found in daily_usage(*asked) if "day" in by else [summed_usage(*asked)]:
        is_cut = is_cut or len(found) >= LEDGER_GROUPS
        for group, sums in found:
            key = tuple(group[column] for column in by)
            before = groups.get(key, [None] * len(SUMS))
            groups[key] = [plus(one, other) for one, other in zip(before, sums)]
    return is_cut


def print_csv(rows: Sequence[JsonDict], by: Sequence[str]) -> None:
    """The rows as CSV (RFC 4180) with a head."""
    import csv

    text = io.StringIO()  # sys.stdout may be closed, which print() takes for nowhere
    writer = csv.DictWriter(text, list(usage_row(dict.fromkeys(by, ""), [0] * len(SUMS))))
    writer.writeheader()
    writer.writerows({**row, **{name: csv_text(row[name]) for name in by}} for row in rows)
    print(text.getvalue(), end="")


# What spreadsheets compute; Cloudflare's models, such as @cf/meta/llama-3, are no formulas.
FORMULA = re.compile(r"[=+-]|@[^(]*\(")


def csv_text(name: str) -> str:
    """A name, which a client may have chosen, as a cell that no spreadsheet computes, and no terminal obeys."""
    text = name if name.isprintable() else log_text(name)
    return f"'{text}" if FORMULA.match(text) else text


def usage_table(rows: Sequence[JsonDict], total: JsonDict, by: Sequence[str], period: str) -> Iterator[str]:
    """The rows as a table, with a total, for people."""
    if not rows:
        yield f"nothing was used {period}"
        return
    columns = ("requests", "errors", "input", "cache read", "cache write", "output", "cost")
    lines = [[*by, *columns]]
    for row in (*rows, {**dict.fromkeys(by, ""), by[0]: "total", **total}):
        written = row["cache_write"] + row["cache_write_long"]
        counts = (row["requests"], row["errors"], row["input"], row["cache_read"], written, row["output"])
        cost = "?" if row["usd"] is None else usd_text(row["usd"] * 1e9)
        lines.append([*(log_text(row[name]).strip() for name in by), *(f"{count:,}" for count in counts), cost])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for number, line in enumerate(lines):
        if number in (1, len(lines) - 1):
            yield "  ".join("-" * width for width in widths)
        names = [text.ljust(width) for text, width in zip(line, widths[: len(by)])]
        yield "  ".join([*names, *(text.rjust(width) for text, width in zip(line[len(by) :], widths[len(by) :]))])
    yield f"{period}; costs are estimates by the prices of the time, ? is without a price"
    if total["untold"]:
        yield f"{total['untold']:,} answers told nothing of their tokens, or not all of it"


def run_hash_password(options: JsonDict) -> int:
    """Prints the hash of a password that is typed, or comes on stdin."""
    if not sys.stdin:
        raise OSError(errno.EBADF, "there is no stdin to read the password from")
    if sys.stdin.isatty():
        import getpass

        given = getpass.getpass("Password: ")
        if given and getpass.getpass("Again: ") != given:
            print("monorelay: these were two passwords; try again", file=sys.stderr)
            return 1
    else:
        try:
            given = sys.stdin.readline().rstrip("\r\n")
        except UnicodeDecodeError:
            raise OSError(errno.EILSEQ, f"the password on stdin is no text in {sys.stdin.encoding}") from None
    if not given:
        print("monorelay: the password is empty", file=sys.stderr)
        return 1
    print(hash_password(given))
    return 0


def run_token(options: JsonDict, username: str) -> int:
    """Prints an access token for a user."""
    path = config_path(options)
    config, name = load_config(path, options), config_name(path)
    if not config.server.jwt_secret:
        raise ConfigError([f"{name}: server.jwt_secret: is not set, so there is nothing to sign a token with"])
    if not config.any_subject and username not in config.users:
        raise ConfigError([f"{name}: users: there is no {username}{suggestion(username, config.users)}"])
    claims = token_claims(username, "access", options.get("expires", 30 * 86400), config, time.time())
    print(sign_token(claims, config.server.jwt_secret.reveal()))
    print(f"valid for {username} until {utc_time(claims['exp'])}Z", file=sys.stderr)
    if username in config.users and not config.users[username].enabled:
        print(f"{username} is disabled in {name}: as long as that lasts, the token is refused", file=sys.stderr)
    return 0


def run_serve(options: JsonDict) -> int:
    """Serves until a signal says otherwise, alone or as the supervisor of several workers."""
    path = config_path(options)
    seen = file_state(path)  # as it was before it is read: an edit meanwhile is taken up
    given = load_prices(load_config(path, options), path)
    config = with_run_secrets(given, None)
    file = ConfigFile(config, path, options, seen)
    raise_descriptor_limit()
    enlarge_stacks()
    collect_rarely()
    supervised = config.server.workers > 1
    # Whoever can connect must be able to count on an end in good order.
    signals = Signals(*OPERATOR_SIGNALS, "SIGCHLD") if supervised else Signals(*OPERATOR_SIGNALS)
    listeners = listen(config.server)
    host, port = listeners[0].getsockname()[:2]
    made_up = config.server.access_keys != given.server.access_keys
    lines = list(banner(config, path, relay_url(host, port), made_up))
    try:
        if supervised:
            # Python's own way out would wait for a log that nobody reads.
            os._exit(Supervisor(file, listeners).run(signals, lines))
        server = RelayServer(config, None, listeners)
        operator = Operator(server, file)
        server.log.announce(lines)
        server.start()
    except RuntimeError:
        raise OSError(errno.EAGAIN, "the system gives out too few threads; raise `ulimit -u`") from None
    return outlast_script(lambda: outlast_shortage(lambda: operator.run(signals)))


def describe_config(config: Config) -> Iterator[str]:
    """The providers, routes, aliases and the rest of a configuration, a line each."""
    for provider in config.providers.values():
        if not provider.enabled:
            state = "disabled"
        elif provider.keys is None:
            takes = "takes the clients' own keys" if provider.client_keys else "takes no key"
            state = "usable" if provider.format == "echo" else f"usable, {takes}"
        else:
            state = f"usable, keys: {', '.join(key.label for key in provider.keys)}" if provider.keys else "has no key"
        yield f"  provider   {provider.name} ({provider.format}): {state}"
    for pattern, names in config.routes.items():
        yield f"  route      {pattern} -> {', '.join(names)}"
    for alias, names in config.aliases.items():
        yield f"  alias      {alias} -> {', '.join(names)}"
    if config.users:
        yield f"  users      {', '.join(config.users)}"
    if config.ledger:
        path = config.ledger.path.removeprefix(current_folder())
        yield f"  ledger     {path}, kept for {config.ledger.keep_days} days"
    if config.prices:
        count, day = len(config.prices.by_name) + len(config.prices.by_pattern), config.prices.as_of
        yield f"  prices     {count} entries{f' of {day}' if day else ''}"


def current_folder() -> str:
    """The folder that this process is in, with its / at the end; empty when it was removed."""
    try:
        return os.path.join(os.getcwd(), "")
    except OSError:
        return ""


def banner(config: Config, path: str, url: str, made_up: bool) -> Iterator[str]:
    """What an owner wants to see at the start: where, what, and how to call it. Of secrets it shows only an
    access key that was made up for this run."""
    yield f"MonoRelay {__version__} serves {path or 'its built-in configuration'} at {url}"
    yield from describe_config(config)
    for missing in missing_keys(config, path):
        yield f"  missing    {missing}"
    for warning in file_warnings(path, config):
        yield f"  warning    {warning}"
    token = config.server.access_keys[0].reveal() if made_up else token_expression(config, os.path.abspath(path))
    if made_up:
        yield f"  access key {token}"
        yield "             (made for this run; set MONORELAY_ACCESS_KEY to choose one)"
    yield f"  try it     {curl_line(config, url, token)}"
    if re.fullmatch(r"\$\w+", token):
        yield f"             (in a shell where {token[1:]} is set as here)"
    shown = token or "YOUR_KEY"
    yield f"  clients    Claude Code:\n{INDENT}ANTHROPIC_BASE_URL={url} \\\n{INDENT}ANTHROPIC_AUTH_TOKEN={shown} claude"
    yield f"             Anthropic SDKs: base_url {url}"
    yield f"             OpenAI SDKs, Vercel AI SDK: base_url {url}/v1"
    if config.server.dashboard:
        yield f"  page       {url}/dashboard"
    yield "  stop it    Ctrl-C"


INDENT = " " * 15  # of the lines of a command


def missing_keys(config: Config, path: str) -> Iterator[str]:
    """What to set for each provider that has no key, and for which routes echo stands in until then."""
    echoed = [pattern for pattern, names in config.routes.items() if answers_for_others(config, names)]
    for provider in config.providers.values():
        if provider.enabled and provider.keys == ():
            variables = key_variables(path, provider.name)
            remedy = f"set {' or '.join(variables)}" if variables else f"put one into providers.{provider.name}.keys"
            routes = [pattern for pattern in echoed if provider.name in config.routes[pattern]]
            meanwhile = f"; until then echo answers for {listing(routes)}" if routes else ""
            yield f"{provider.name} has no key: {remedy}{meanwhile}"


def answers_for_others(config: Config, names: Sequence[str]) -> bool:
    """Whether echo stands in for the other providers of a route."""
    targets = without_stand_in([Target(config.providers[name], "") for name in names])
    return any(target.provider.format == "echo" for target in targets)


def key_variables(path: str, provider: str) -> list[str]:
    """The variables of the environment that the keys of a provider are read from."""
    keys = json.dumps(as_written(path, "providers", provider, "keys"))
    return [match[1] for match in re.finditer(VARIABLE, keys) if not match[1].startswith("file:")]


def as_written(path: str, *names: str) -> Any:
    """What stands in the configuration at a place, variables and all; None where nothing does, or it can't be read."""
    try:
        with open(path, encoding="utf-8-sig") if path else io.StringIO(BUILT_IN_CONFIG) as file:
            return functools.reduce(operator.getitem, names, json.load(file))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def token_expression(config: Config, path: str) -> str:
    """What a shell replaces by a token of this relay, so that none is ever printed; empty if there is none."""
    for key in config.server.access_keys:
        for name, value in os.environ.items():
            if value == key.reveal() and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                return f"${name}"
    if config.server.access_keys:
        for index, key_text in enumerate(texts_in(as_written(path, "server", "access_key"))):
            if Secret(key_text) in config.server.access_keys:
                code = 'import json,sys;k=json.load(open(sys.argv[1]))["server"]["access_key"]'
                code += f";print(k if isinstance(k,str) else k[{index}])"
                return f"$(python3 -c {shlex.quote(code)} {shlex.quote(path)})"
            elsewhere = re.fullmatch(VARIABLE, key_text)
            if elsewhere:
                return from_file(elsewhere[1], path, config.env_file)
    if config.server.access_keys or not config.server.jwt_secret:
        return ""
    anybody = "me" if config.any_subject else ""
    free = (user.name for user in config.users.values() if user.models is None and user.enabled and not user.viewer)
    user = next(free, anybody)
    command = ["python3", PROGRAM_PATH, "token", user, "--config", path]
    return f"$({' '.join(map(shlex.quote, command))})" if user else ""


def from_file(name: str, path: str, env_file: str) -> str:
    """What a shell replaces by a variable of the env_file, or by what the file holds that it names."""
    if name.startswith("file:"):
        return f"$(cat {shlex.quote(beside(path, name[len('file:') :]))})"
    if not env_file:
        return ""
    # Read as env_line() reads it: to a shell a blank or a `;` in a value, or a line's CRLF, would mean something else.
    line = f"s/^ *(export +)?{name} *= *[\\\"']?([^\\\"'[:cntrl:]]*).*/\\2/p"
    return f'$(sed -nE "{line}" {shlex.quote(beside(path, env_file))} | tail -n 1)'


def curl_line(config: Config, url: str, token: str) -> str:
    """A call that works as it is: a message to echo where there is a route to it, else the list of models."""
    if not token:
        return f"curl {url}/health"
    try:
        to_echo = any(target.provider.format == "echo" for target in targets_for(config, "echo", "anthropic"))
    except RelayError:
        to_echo = False
    if not to_echo:
        return f'curl {url}/v1/models \\\n{INDENT}-H "x-api-key: {token}"'
    body = (
        f'{{"model": "echo", "max_tokens": 64,\n{INDENT}"messages": [{{"role": "user", "content": "Hello, relay!"}}]}}'
    )
    return f"curl {url}/v1/messages \\\n{INDENT}-H \"x-api-key: {token}\" \\\n{INDENT}-d '{body}'"


# -- what `check` and the banner warn of

# What examples and other programs' settings have in the place of a key.
LIKE_PLACEHOLDER = "looks like a placeholder or an unexpanded variable; write ${NAME}"
PLACEHOLDER = re.compile(r"(?i)^\$|^\{\{|^\{?env:|^%.*%$|^os\.environ|\.\.\.|^<.*>$|your[-_ ]|changeme|^x+$")
# What browsers send as `origin` (RFC 6454): a scheme, a host and perhaps a port, no path; or a pattern of such.
LIKE_ORIGIN = re.compile(r"null|[^/]+://[^/]+|[*?[].*(?<!/)")
REGULAR_EXPRESSION = re.compile(r"\.[*+]|[(|^$\\]")


def file_warnings(path: str, config: Config) -> Iterator[str]:
    """All warnings of a file: of its configuration, its proxies and folders, and of secrets that others may read."""
    yield from config_warnings(config)
    for provider in config.providers.values():
        try:
            proxy_for(provider)
        except OSError as error:
            yield f"providers.{provider.name}: the proxy to it can't be used: {error.strerror}"
    folder = os.path.dirname(config.ledger.path) if config.ledger else ""
    if folder and not os.access(folder, os.W_OK):
        yield f"ledger.path: nothing can be written to the folder {folder}; make it, or name another one"
    if config.ledger and os.path.isdir(config.ledger.path):
        yield f"ledger.path: {config.ledger.path} is a folder; name a file in it, such as usage.db"
    if config.ledger and not begins_as_database(config.ledger.path):
        yield f"ledger.path: {config.ledger.path} is no SQLite database: a ledger takes its place, and it is renamed"
    try:
        with open(path, encoding="utf-8") as file:
            source = file.read()
        mode = os.stat(path).st_mode
    except OSError:
        return
    secrets = [key.secret for provider in config.providers.values() for key in provider.keys or ()]
    secrets += [*config.server.access_keys, *filter(None, [config.server.jwt_secret])]
    if os.name != "nt" and mode & 0o044 and any(secret.reveal() in source for secret in secrets):
        yield f"{path} holds secrets and can be read by other users of this machine; run: chmod 600 {path}"


def config_warnings(config: Config) -> Iterator[str]:
    """Warnings of what is allowed and probably wrong, and how to mend it."""
    for provider in config.providers.values():
        yield from provider_warnings(provider, f"providers.{provider.name}")
    yield from route_warnings(config)
    yield from caller_warnings(config)
    for alias, names in config.aliases.items():
        for name in names:
            if "@" in name and name.rpartition("@")[2] not in config.providers:
                yield f"aliases.{alias}: {name} names no provider of this file, and goes upstream as it is"
    for place, targets in named_targets(config):
        asked = for_one_credential(targets)
        for name in dict.fromkeys(target.provider.name for target in targets if target not in asked):
            yield f"{place}: {name} gets nothing, a client's own key is for the first that takes one; name it elsewhere"
    yield from price_warnings(config)
    if config.ledger and not sqlite3:
        yield NO_SQLITE
    if "admin" in config.users:
        yield "users.admin: is called like the owner; give it another name to tell them apart in the log"
    if not any(provider.usable for provider in config.providers.values()) or not (config.routes or config.aliases):
        yield "nothing is served: there must be a provider with a key, and a route or an alias to it"


def caller_warnings(config: Config) -> Iterator[str]:
    """Warnings of the secrets and origins by which callers are known."""
    for origin in itertools.filterfalse(LIKE_ORIGIN.fullmatch, config.server.cors_origins):
        yield f"server.cors_origins: {origin} is never matched; an origin is like http://localhost:3000, without a path"
    if any(PLACEHOLDER.search(key.reveal()) for key in config.server.access_keys):
        yield f"server.access_key: one {LIKE_PLACEHOLDER}"
    run_secret = config.run_secrets.jwt_secret if config.run_secrets else None
    if config.server.jwt_secret in (None, run_secret) and any(user.password for user in config.users.values()):
        yield "server.jwt_secret: is not set, so that all who log in have to do so again when the relay restarts"


def route_warnings(config: Config) -> Iterator[str]:
    """Warnings of the routes."""
    passed: list[str] = []
    for pattern in config.routes:
        before = next((other for other in passed if matches(pattern, other)), None)
        if before:
            yield f"routes.{pattern}: is never reached, {before} matches first; put it before that"
        if REGULAR_EXPRESSION.search(pattern):
            yield f"routes.{pattern}: looks like a regular expression; patterns know *, ? and [...] only"
        passed.append(pattern)


def provider_warnings(provider: Provider, place: str) -> Iterator[str]:
    """Warnings of one provider."""
    for key in provider.keys or ():
        if PLACEHOLDER.search(key.secret.reveal()):
            yield f"{place}.keys: {key.label} {LIKE_PLACEHOLDER}"
    if provider.scheme == "http" and provider.keys and not is_loopback(provider.host):
        yield f"{place}.base_url: its keys travel in clear text over plain http; use https"
    if provider.format == "openai" and not provider.prefix:
        yield f"{place}.base_url: has no path; that of OpenAI's SDK ends in /v1"


def named_targets(config: Config) -> Iterator[tuple[str, list[Target]]]:
    """The targets of each route and alias that has some, and its place in relay.json."""
    sections: tuple[tuple[str, Iterable[str]], ...] = (("routes", config.routes), ("aliases", config.aliases))
    for section, names in sections:
        for name in names:
            with contextlib.suppress(RelayError):  # it has none
                yield f"{section}.{name}", resolve(config, name)


# A million tokens of the cheapest models cost more than this, and one of the dearest, o1-pro's, costs less.
LIKE_ONE_TOKEN_USD = 0.0002


def price_warnings(config: Config) -> Iterator[str]:
    """Prices that can't be meant, and models that can be called and that no budget in USD limits, for want of one."""
    for pattern, price in config.prices.by_pattern if config.prices else ():
        if 0 < price.rates["input", "", 0] < exact(LIKE_ONE_TOKEN_USD) // 1_000_000:
            yield f"prices: {pattern}.input looks like USD for one token; write those for a million"
    limited = next((user.name for user in config.users.values() if user.usd_per_day or user.usd_per_month), "")
    if not limited:
        return
    if not config.prices:
        yield f"prices: are missing, so that the budget of {limited} limits nothing; name a price file or list them"
        return
    known = sorted([*config.prices.by_name, *(pattern for pattern, _ in config.prices.by_pattern)])
    for _, targets in named_targets(config):
        for provider, model in targets:
            if provider.format != "echo" and not may_have_price(config.prices, known, provider, model):
                yield f"prices: there is none for {model} at {provider.name}, which no budget in USD limits; add one"


def may_have_price(prices: Prices, known: Sequence[str], provider: Provider, pattern: str) -> bool:
    """Whether there is a price for some model that matches the pattern. `known`: the names of all, sorted."""
    if find_price(prices, provider, pattern):
        return True
    return any(some_match(known, asked) for name in plain_names(pattern) for asked in (name, f"{provider.name}/{name}"))


def some_match(names: Sequence[str], pattern: str) -> bool:
    """Whether one of the sorted names matches the pattern. Of thousands, only those that begin like it are compared."""
    stem = WILDCARD.split(pattern, 1)[0]
    alike = itertools.takewhile(lambda name: name.startswith(stem), names[bisect.bisect_left(names, stem) :])
    return any(matches(name, pattern) for name in alike)


# -- the command line: options with what checks each, and commands with what runs them and the options they take

OPTIONS: Mapping[str, Check] = {
    "config": as_some_text,
    "host": as_host,
    "port": as_whole(0, 65535),
    "expires": lifetime,
    "days": as_whole(1, LEDGER_SUMS_DAYS),
    "by": usage_columns,
}
FLAGS = ("csv", "json")  # options without a value
OPERANDS = {"token": "USER", "route": "MODEL"}
COMMANDS: Mapping[str, tuple[Callable[..., int], Sequence[str]]] = {
    "serve": (run_serve, ("config", "host", "port")),
    "check": (run_check, ("config", "host", "port")),
    "route": (run_route, ("config",)),
    "usage": (run_usage, ("config", "days", "by", *FLAGS)),
    "hash-password": (run_hash_password, ()),
    "token": (run_token, ("config", "expires")),
}


if __name__ == "__main__":
    sys.exit(main())
