/*
 * ring.h - what ring.c offers to vchan.c and to the tests only: the control page, byte by byte, and how a client reads
 * a server's. The functions for everybody are in api.h.
 */
#ifndef RING_H
#define RING_H

#include "sa.h"

#include <stdatomic.h>

enum {
	RING_NOTIFY_WRITE = 1, /* tell me when you have written */
	RING_NOTIFY_READ = 2,  /* tell me when you have read */
	RING_MAX_PAGES = 1 << (SA_RING_MAX_ORDER - 12)
};

/* Counters of one ring. They count bytes, wrap at 2^32, and are never reduced to the ring's size. */
struct ring_counters {
	_Atomic(uint32_t) cons; /* written by who reads the ring */
	_Atomic(uint32_t) prod; /* written by who writes it */
};

/* UNTRUSTED: all of it, for both sides, as long as the page is shared. Atomic, so that each load is one load. */
struct ring_control {
	struct ring_counters left, right;
	_Atomic(uint16_t) left_order, right_order;
	_Atomic(uint8_t) cli_live, srv_live;     /* 0 has left, 1 is here, 2 (client only) has not come yet */
	_Atomic(uint8_t) cli_notify, srv_notify; /* what the client, the server is to tell its peer */
	_Atomic(uint32_t) grants[];              /* of the left ring's own pages, then of the right ring's */
};

_Static_assert(sizeof(struct ring_control) == 24, "libxenvchan's vchan_interface");
_Static_assert(ATOMIC_SHORT_LOCK_FREE == 2 && ATOMIC_CHAR_LOCK_FREE == 2 && ATOMIC_INT_LOCK_FREE == 2,
               "a lock in this process says nothing to the peer");

/* What a server offers, read once. */
struct ring_offer {
	uint32_t left_order, right_order;
	uint32_t left_pages, right_pages;
	uint32_t grants[2 * RING_MAX_PAGES]; /* left_pages + right_pages of them */
};

/* Read a control page as a client that has not connected. -EBUSY: it waits for no client; -EPROTO: it makes no sense. */
int ring_read_offer(const struct ring_control *control, struct ring_offer *ret);

#endif
