/*
 * ring.c - byte rings in memory that is shared with somebody who is not trusted. No system calls, no devices: where the
 * memory comes from and how an event travels is vchan.c's, or a test's.
 *
 * Trust. The peer can write every byte of the control page and of the rings at any moment. So this side keeps its own
 * counters and sizes and never reads them back; of the peer's fields each is loaded once per use, into a local, and
 * checked against the ring's size, which is ours. A lie costs -EPROTO, never an access outside. Bytes are copied out
 * once; what they mean is judged on the copy.
 *
 * Order. One thread of each side moves bytes, so each counter has one writer.
 * - Bytes: the writer stores them, then stores prod with release; the reader loads prod with acquire, then loads them.
 * - Room: the reader loads the bytes, then stores cons with release; the writer loads cons with acquire, then stores over
 *   them. (Release keeps earlier loads before the store, too.)
 * - Events: "ask for an event, then look at the counter again" races with "move the counter, then look whether an event
 *   was asked for". Each side has a full fence between its store and its load, so at least one of the two loads sees the
 *   other side's store (the store-buffering litmus test): either the asker sees the new counter, or the mover sees the
 *   request and sends the event. An event too many is harmless, one too few would be a hang.
 * libxenvchan's io.c does the same with xen_mb() and locked operations, so any mix of the two works.
 */
#include "ring.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { SMALL_ORDER = 10, LARGE_ORDER = 11, PAGE_ORDER = 12, SMALL_OFFSET = 1024, LARGE_OFFSET = 2048 };

/* One of the two rings, as this side sees it. */
struct way {
	struct ring_counters *counters;
	uint8_t *bytes;
	uint32_t size;
	uint32_t own; /* our counter: cons of the ring we read, prod of the one we write */
};

struct sa_ring {
	struct way in, out;
	_Atomic(uint8_t) *own_live, *peer_live;
	_Atomic(uint8_t) *ask;   /* what the peer is to tell us */
	_Atomic(uint8_t) *asked; /* what we are to tell the peer */
	bool server;
	int state;
};

/* ------------------------------------------------------------------------------------------------- control page */

static uint32_t own_pages(uint32_t order)
{
	return order < PAGE_ORDER ? 0 : UINT32_C(1) << (order - PAGE_ORDER);
}

static uint32_t inside_offset(uint32_t order)
{
	return order == SMALL_ORDER ? SMALL_OFFSET : LARGE_OFFSET;
}

int sa_ring_pages(uint32_t left_order, uint32_t right_order, uint32_t *ret_left, uint32_t *ret_right)
{
	const uint32_t orders[] = {left_order, right_order};
	size_t grants_end;

	for (int i = 0; i < 2; i++) {
		if (orders[i] < SA_RING_MIN_ORDER || orders[i] > SA_RING_MAX_ORDER)
			return -EINVAL;
	}
	if (left_order == right_order && left_order < PAGE_ORDER)
		return -EINVAL; /* at the same place of the page */
	grants_end = sizeof(struct ring_control) +
	             ((size_t)own_pages(left_order) + own_pages(right_order)) * sizeof(uint32_t);
	for (int i = 0; i < 2; i++) {
		if (orders[i] < PAGE_ORDER && grants_end > inside_offset(orders[i]))
			return -EINVAL;
	}
	/* Two rings of the largest order: 24 + 512 * 4 bytes, so the page always has room for its list. */
	*ret_left = own_pages(left_order);
	*ret_right = own_pages(right_order);
	return 0;
}

int sa_ring_format(uint8_t *ret_control, uint32_t left_order, uint32_t right_order, const uint32_t *grants)
{
	struct ring_control *control = (struct ring_control *)(void *)ret_control;
	uint32_t left;
	uint32_t right;
	const int error = sa_ring_pages(left_order, right_order, &left, &right);

	if (error)
		return error;
	if ((uintptr_t)ret_control % sizeof(uint32_t) != 0)
		return -EINVAL;
	memset(ret_control, 0, SA_PAGE_SIZE);
	atomic_store_explicit(&control->left_order, (uint16_t)left_order, memory_order_relaxed);
	atomic_store_explicit(&control->right_order, (uint16_t)right_order, memory_order_relaxed);
	for (uint32_t i = 0; grants && i < left + right; i++)
		atomic_store_explicit(&control->grants[i], grants[i], memory_order_relaxed);
	/* A server waits for bytes from the start, and cannot ask before somebody is there. */
	atomic_store_explicit(&control->cli_notify, RING_NOTIFY_WRITE, memory_order_relaxed);
	atomic_store_explicit(&control->cli_live, 2, memory_order_relaxed);
	atomic_store_explicit(&control->srv_live, 1, memory_order_release);
	return 0;
}

int ring_read_offer(const struct ring_control *control, struct ring_offer *ret)
{
	/* UNTRUSTED: each field once, into a local that is then checked. */
	const uint8_t srv_live = atomic_load_explicit(&control->srv_live, memory_order_acquire);
	const uint8_t cli_live = atomic_load_explicit(&control->cli_live, memory_order_relaxed);

	if (srv_live != 1 || cli_live != 2)
		return -EBUSY;
	ret->left_order = atomic_load_explicit(&control->left_order, memory_order_relaxed);
	ret->right_order = atomic_load_explicit(&control->right_order, memory_order_relaxed);
	if (sa_ring_pages(ret->left_order, ret->right_order, &ret->left_pages, &ret->right_pages))
		return -EPROTO;
	/* UNTRUSTED: a reference that is none of ours is refused by Xen when it is mapped. */
	for (uint32_t i = 0; i < ret->left_pages + ret->right_pages; i++)
		ret->grants[i] = atomic_load_explicit(&control->grants[i], memory_order_relaxed);
	return 0;
}

/* ------------------------------------------------------------------------------------------------------ a side */

static struct way make_way(struct ring_counters *counters, _Atomic(uint32_t) *own, uint8_t *control, uint8_t *pages,
                           uint32_t order)
{
	return (struct way){
		.counters = counters,
		.bytes = pages ? pages : control + inside_offset(order),
		.size = UINT32_C(1) << order,
		/* UNTRUSTED: any number is as good a start as any other; from here on it is ours. */
		.own = atomic_load_explicit(own, memory_order_relaxed),
	};
}

int sa_ring_create(int side, uint8_t *control, uint8_t *left, uint8_t *right, uint32_t left_order, uint32_t right_order,
                   sa_ring **ret)
{
	struct ring_control *page = (struct ring_control *)(void *)control;
	struct way left_way;
	struct way right_way;
	uint32_t left_pages;
	uint32_t right_pages;
	sa_ring *ring;
	const int error = sa_ring_pages(left_order, right_order, &left_pages, &right_pages);

	*ret = NULL;
	if (error)
		return error;
	if ((side != SA_RING_SERVER && side != SA_RING_CLIENT) || (uintptr_t)control % sizeof(uint32_t) != 0 ||
	    (left != NULL) != (left_pages > 0) || (right != NULL) != (right_pages > 0))
		return -EINVAL;
	ring = malloc(sizeof *ring);
	if (ring == NULL)
		return -ENOMEM;
	left_way = make_way(&page->left, side == SA_RING_SERVER ? &page->left.cons : &page->left.prod, control, left,
	                    left_order);
	right_way = make_way(&page->right, side == SA_RING_SERVER ? &page->right.prod : &page->right.cons, control,
	                     right, right_order);
	if (side == SA_RING_SERVER) {
		*ring = (sa_ring){
			.in = left_way,
			.out = right_way,
			.own_live = &page->srv_live,
			.peer_live = &page->cli_live,
			.ask = &page->cli_notify,
			.asked = &page->srv_notify,
			.server = true,
			.state = SA_RING_WAITING,
		};
	} else {
		*ring = (sa_ring){
			.in = right_way,
			.out = left_way,
			.own_live = &page->cli_live,
			.peer_live = &page->srv_live,
			.ask = &page->srv_notify,
			.asked = &page->cli_notify,
			.server = false,
			.state = SA_RING_OPEN,
		};
	}
	*ret = ring;
	return 0;
}

void sa_ring_destroy(sa_ring *ring)
{
	free(ring);
}

void sa_ring_connect(sa_ring *ring)
{
	(void)atomic_fetch_or(ring->ask, RING_NOTIFY_WRITE);
	atomic_store_explicit(ring->own_live, 1, memory_order_release);
}

void sa_ring_hang_up(sa_ring *ring)
{
	/* Release: whoever sees it sees the bytes that were written before. */
	atomic_store_explicit(ring->own_live, 0, memory_order_release);
}

int sa_ring_state(sa_ring *ring)
{
	/* UNTRUSTED: one load; what it once said cannot be taken back. */
	const uint8_t live = atomic_load_explicit(ring->peer_live, memory_order_acquire);

	if (ring->state != SA_RING_CLOSED) {
		if (live == 1)
			ring->state = SA_RING_OPEN;
		else if (live != 2 || !ring->server || ring->state != SA_RING_WAITING)
			ring->state = SA_RING_CLOSED;
	}
	return ring->state;
}

/* ------------------------------------------------------------------------------------------------------- bytes */

static void ask(const sa_ring *ring, uint8_t what)
{
	(void)atomic_fetch_or(ring->ask, what);
	/* The request before the next look at the peer's counter. */
	atomic_thread_fence(memory_order_seq_cst);
}

static int asked(const sa_ring *ring, uint8_t what)
{
	/* Our counter before this look at the request. */
	atomic_thread_fence(memory_order_seq_cst);
	/* UNTRUSTED: the worst it can do is to ask for an event or to go without. Most of the time nothing is asked, and
	 * the line of memory need not be taken from the peer. */
	if (!(atomic_load_explicit(ring->asked, memory_order_relaxed) & what))
		return 0;
	return (atomic_fetch_and(ring->asked, (uint8_t)~what) & what) != 0;
}

/* Bytes in the ring that we read. */
static int filled(const struct way *in, uint32_t *ret)
{
	/* UNTRUSTED: read once, bounded by our own size. */
	const uint32_t prod = atomic_load_explicit(&in->counters->prod, memory_order_acquire);
	const uint32_t n = prod - in->own;

	*ret = n;
	return n > in->size ? -EPROTO : 0;
}

/* Room in the ring that we write. */
static int vacant(const struct way *out, uint32_t *ret)
{
	/* UNTRUSTED: read once, bounded by our own size. */
	const uint32_t cons = atomic_load_explicit(&out->counters->cons, memory_order_acquire);
	const uint32_t used = out->own - cons;

	*ret = out->size - used;
	return used > out->size ? -EPROTO : 0;
}

int sa_ring_read(sa_ring *ring, uint8_t *ret_bytes, size_t max, size_t *ret_n, int *ret_notify)
{
	struct way *in = &ring->in;
	uint32_t n;
	uint32_t at;
	uint32_t first;
	int error = filled(in, &n);

	*ret_n = 0;
	*ret_notify = 0;
	if (!error && n < max) {
		ask(ring, RING_NOTIFY_WRITE);
		error = filled(in, &n);
	}
	if (error)
		return error;
	if (n > max)
		n = (uint32_t)max;
	if (n == 0)
		return 0;
	at = in->own & (in->size - 1);
	first = n < in->size - at ? n : in->size - at;
	memcpy(ret_bytes, in->bytes + at, first);
	memcpy(ret_bytes + first, in->bytes, n - first);
	in->own += n;
	atomic_store_explicit(&in->counters->cons, in->own, memory_order_release);
	*ret_n = n;
	*ret_notify = asked(ring, RING_NOTIFY_READ);
	return 0;
}

int sa_ring_write(sa_ring *ring, const uint8_t *bytes, size_t max, size_t *ret_n, int *ret_notify)
{
	struct way *out = &ring->out;
	uint32_t n;
	uint32_t at;
	uint32_t first;
	int error = vacant(out, &n);

	*ret_n = 0;
	*ret_notify = 0;
	if (!error && n < max) {
		ask(ring, RING_NOTIFY_READ);
		error = vacant(out, &n);
	}
	if (error)
		return error;
	if (n > max)
		n = (uint32_t)max;
	if (n == 0)
		return 0;
	at = out->own & (out->size - 1);
	first = n < out->size - at ? n : out->size - at;
	memcpy(out->bytes + at, bytes, first);
	memcpy(out->bytes, bytes + first, n - first);
	out->own += n;
	atomic_store_explicit(&out->counters->prod, out->own, memory_order_release);
	*ret_n = n;
	*ret_notify = asked(ring, RING_NOTIFY_WRITE);
	return 0;
}
