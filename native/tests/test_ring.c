/*
 * test_ring.c - the byte rings over plain memory: every pair of orders, wrap-around of positions and of counters, two
 * threads at a time with events that sleep for real, and a peer that writes anything at any time. Rings lie in buffers
 * of their exact size, so that a sanitizer sees every byte outside.
 */
#include "check.h"
#include "ring.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

enum { TURNS = 40000 };

/* splitmix64, so that every run is the same; a state for each thread */
static uint64_t draw(uint64_t *state)
{
	uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);

	z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
	return z ^ (z >> 31);
}

static int64_t seconds(void)
{
	struct timespec now;

	if (clock_gettime(CLOCK_MONOTONIC, &now) != 0)
		abort();
	return now.tv_sec;
}

struct memory {
	uint8_t *control, *left, *right;
	uint32_t left_order, right_order;
};

static uint8_t *exactly(size_t bytes)
{
	uint8_t *memory;

	if (bytes == 0)
		return NULL;
	memory = malloc(bytes);
	if (memory == NULL)
		abort();
	memset(memory, 0xee, bytes);
	return memory;
}

static struct memory memory_of(uint32_t left_order, uint32_t right_order)
{
	uint32_t left = 0;
	uint32_t right = 0;
	struct memory memory = {.left_order = left_order, .right_order = right_order};

	CHECK(sa_ring_pages(left_order, right_order, &left, &right) == 0);
	memory.control = exactly(SA_PAGE_SIZE);
	memory.left = exactly((size_t)left * SA_PAGE_SIZE);
	memory.right = exactly((size_t)right * SA_PAGE_SIZE);
	CHECK(sa_ring_format(memory.control, left_order, right_order, NULL) == 0);
	return memory;
}

static struct ring_control *page_of(const struct memory *memory)
{
	return (struct ring_control *)(void *)memory->control;
}

static sa_ring *side_of(const struct memory *memory, int side)
{
	sa_ring *ring = NULL;

	if (!CHECK(sa_ring_create(side, memory->control, memory->left, memory->right, memory->left_order,
	                          memory->right_order, &ring) == 0))
		abort();
	if (side == SA_RING_CLIENT)
		sa_ring_connect(ring);
	return ring;
}

static void forget(struct memory *memory)
{
	free(memory->control);
	free(memory->left);
	free(memory->right);
}

static void test_orders(void)
{
	uint32_t left;
	uint32_t right;
	uint8_t *odd = exactly(2 * SA_PAGE_SIZE);

	CHECK(sa_ring_pages(10, 11, &left, &right) == 0 && left == 0 && right == 0);
	CHECK(sa_ring_pages(11, 10, &left, &right) == 0 && left == 0 && right == 0);
	CHECK(sa_ring_pages(12, 16, &left, &right) == 0 && left == 1 && right == 16);
	CHECK(sa_ring_pages(11, 20, &left, &right) == 0 && left == 0 && right == 256);
	CHECK(sa_ring_pages(20, 20, &left, &right) == 0 && left == 256 && right == 256);
	CHECK(sa_ring_pages(10, 10, &left, &right) == -EINVAL);
	CHECK(sa_ring_pages(11, 11, &left, &right) == -EINVAL);
	CHECK(sa_ring_pages(9, 12, &left, &right) == -EINVAL);
	CHECK(sa_ring_pages(12, 21, &left, &right) == -EINVAL);
	CHECK(sa_ring_pages(12, UINT32_MAX, &left, &right) == -EINVAL);
	/* 24 + 256 * 4 bytes of references end behind byte 1024, where the ring of order 10 begins. */
	CHECK(sa_ring_pages(10, 20, &left, &right) == -EINVAL);
	CHECK(sa_ring_pages(20, 10, &left, &right) == -EINVAL);
	CHECK(sa_ring_pages(10, 19, &left, &right) == 0 && right == 128);
	CHECK(sa_ring_format(odd, 9, 12, NULL) == -EINVAL);
	CHECK(sa_ring_format(odd + 1, 12, 12, NULL) == -EINVAL);
	free(odd);
}

static void test_offer(void)
{
	struct memory memory = memory_of(12, 13);
	struct ring_control *page = page_of(&memory);
	const uint32_t grants[] = {7, 8, 9};
	struct ring_offer offer;
	sa_ring *ring = NULL;

	CHECK(sa_ring_format(memory.control, 12, 13, grants) == 0);
	CHECK(ring_read_offer(page, &offer) == 0);
	CHECK(offer.left_order == 12 && offer.right_order == 13 && offer.left_pages == 1 && offer.right_pages == 2);
	CHECK(memcmp(offer.grants, grants, sizeof grants) == 0);
	/* Where the pages are must agree with the orders. */
	CHECK(sa_ring_create(SA_RING_SERVER, memory.control, NULL, memory.right, 12, 13, &ring) == -EINVAL);
	CHECK(sa_ring_create(SA_RING_SERVER, memory.control, memory.left, memory.right, 11, 13, &ring) == -EINVAL);
	CHECK(sa_ring_create(2, memory.control, memory.left, memory.right, 12, 13, &ring) == -EINVAL);
	CHECK(sa_ring_create(SA_RING_SERVER, memory.control, memory.left, memory.right, 12, 99, &ring) == -EINVAL);
	CHECK(ring == NULL);
	/* Whatever is written there, an offer that is accepted keeps its bounds. */
	for (uint32_t left = 0; left < 70; left++) {
		for (uint32_t right = 0; right < 70; right++) {
			int error;

			atomic_store(&page->left_order, (uint16_t)left);
			atomic_store(&page->right_order, (uint16_t)right);
			error = ring_read_offer(page, &offer);
			if (error ? error != -EPROTO : offer.left_pages + offer.right_pages > 512)
				CHECK(false);
		}
	}
	atomic_store(&page->left_order, (uint16_t)(1 << 15 | 12));
	CHECK(ring_read_offer(page, &offer) == -EPROTO);
	for (unsigned live = 0; live < 256; live++) {
		CHECK(sa_ring_format(memory.control, 12, 13, grants) == 0);
		atomic_store(&page->cli_live, (uint8_t)live);
		CHECK(ring_read_offer(page, &offer) == (live == 2 ? 0 : -EBUSY));
		atomic_store(&page->cli_live, 2);
		atomic_store(&page->srv_live, (uint8_t)live);
		CHECK(ring_read_offer(page, &offer) == (live == 1 ? 0 : -EBUSY));
	}
	forget(&memory);
	sa_ring_destroy(NULL);
}

static void test_states(void)
{
	struct memory memory = memory_of(10, 11);
	struct ring_control *page = page_of(&memory);
	sa_ring *server = side_of(&memory, SA_RING_SERVER);
	sa_ring *client;
	struct ring_offer offer;

	CHECK(sa_ring_state(server) == SA_RING_WAITING);
	client = side_of(&memory, SA_RING_CLIENT);
	CHECK(ring_read_offer(page, &offer) == -EBUSY); /* one client, once */
	CHECK(sa_ring_state(server) == SA_RING_OPEN && sa_ring_state(client) == SA_RING_OPEN);
	sa_ring_hang_up(client);
	CHECK(sa_ring_state(server) == SA_RING_CLOSED);
	atomic_store(&page->cli_live, 1); /* it cannot come back */
	CHECK(sa_ring_state(server) == SA_RING_CLOSED);
	CHECK(sa_ring_state(client) == SA_RING_OPEN);
	sa_ring_hang_up(server);
	CHECK(sa_ring_state(client) == SA_RING_CLOSED);
	sa_ring_destroy(server);
	sa_ring_destroy(client);

	/* What is neither 1 nor a server's first 2 is no peer. */
	for (unsigned live = 0; live < 256; live++) {
		CHECK(sa_ring_format(memory.control, 10, 11, NULL) == 0);
		server = side_of(&memory, SA_RING_SERVER);
		atomic_store(&page->cli_live, (uint8_t)live);
		CHECK(sa_ring_state(server) == (live == 1   ? SA_RING_OPEN
		                                : live == 2 ? SA_RING_WAITING
		                                            : SA_RING_CLOSED));
		atomic_store(&page->cli_live, 1);
		if (sa_ring_state(server) == SA_RING_OPEN)
			atomic_store(&page->cli_live, 2); /* once open, nobody is waited for */
		CHECK(sa_ring_state(server) == SA_RING_CLOSED);
		sa_ring_destroy(server);
	}
	forget(&memory);
}

/* Bytes that say where they belong. */
static uint8_t byte_at(uint64_t position)
{
	return (uint8_t)(position * 131 + (position >> 8) * 17 + (position >> 16));
}

/* Bytes go both ways in pieces of all sizes, through a ring whose counters are about to wrap. */
static void test_bytes(uint32_t left_order, uint32_t right_order)
{
	struct memory memory = memory_of(left_order, right_order);
	struct ring_control *page = page_of(&memory);
	uint64_t random = left_order * 100 + right_order;
	const uint32_t largest = UINT32_C(1) << (left_order > right_order ? left_order : right_order);
	uint8_t *buffer = exactly((size_t)2 * largest);
	size_t wrong = 0;
	sa_ring *side[2];

	atomic_store(&page->left.cons, UINT32_MAX - 5000);
	atomic_store(&page->left.prod, UINT32_MAX - 5000);
	atomic_store(&page->right.cons, UINT32_MAX - 777);
	atomic_store(&page->right.prod, UINT32_MAX - 777);
	side[0] = side_of(&memory, SA_RING_SERVER);
	side[1] = side_of(&memory, SA_RING_CLIENT);
	for (int to = 0; to < 2; to++) {
		const uint32_t size = UINT32_C(1) << (to == 0 ? left_order : right_order);
		const uint64_t total = (uint64_t)size * 5 + 20000;
		uint64_t written = 0;
		uint64_t got = 0;
		int notify;

		while (got < total) {
			size_t ask = (size_t)(draw(&random) % (2 * (uint64_t)size));
			size_t n;

			for (size_t i = 0; i < ask; i++)
				buffer[i] = byte_at(written + i);
			wrong += sa_ring_write(side[1 - to], buffer, ask, &n, &notify) != 0;
			wrong += n != (ask < size - (written - got) ? ask : size - (written - got));
			written += n;
			ask = (size_t)(draw(&random) % (2 * (uint64_t)size));
			wrong += sa_ring_read(side[to], buffer, ask, &n, &notify) != 0;
			wrong += n != (ask < written - got ? ask : written - got);
			for (size_t i = 0; i < n; i++)
				wrong += buffer[i] != byte_at(got + i);
			got += n;
		}
	}
	CHECK(wrong == 0);
	sa_ring_destroy(side[0]);
	sa_ring_destroy(side[1]);
	free(buffer);
	forget(&memory);
}

/* Who asks for an event, and when it is to be sent. */
static void test_notify(void)
{
	struct memory memory = memory_of(10, 12);
	sa_ring *server = side_of(&memory, SA_RING_SERVER);
	sa_ring *client = side_of(&memory, SA_RING_CLIENT);
	uint8_t bytes[4096] = {0};
	size_t n;
	int notify;

	/* Both wait for bytes from the start. */
	CHECK(sa_ring_write(client, bytes, 10, &n, &notify) == 0 && n == 10 && notify);
	CHECK(sa_ring_write(client, bytes, 10, &n, &notify) == 0 && n == 10 && !notify);
	CHECK(sa_ring_write(server, bytes, 10, &n, &notify) == 0 && n == 10 && notify);
	/* Who takes all there is but no fewer than it asked for comes back by itself. */
	CHECK(sa_ring_read(server, bytes, 20, &n, &notify) == 0 && n == 20 && !notify);
	CHECK(sa_ring_write(client, bytes, 1, &n, &notify) == 0 && !notify);
	CHECK(sa_ring_read(server, bytes, 20, &n, &notify) == 0 && n == 1 && !notify);
	CHECK(sa_ring_write(client, bytes, 1, &n, &notify) == 0 && notify);
	/* Full: the reader tells the writer once, at the next byte. */
	CHECK(sa_ring_write(client, bytes, 1023, &n, &notify) == 0 && n == 1023);
	CHECK(sa_ring_read(server, bytes, 1, &n, &notify) == 0 && n == 1 && !notify);
	CHECK(sa_ring_write(client, bytes, 2, &n, &notify) == 0 && n == 1);
	CHECK(sa_ring_write(client, bytes, 1, &n, &notify) == 0 && n == 0 && !notify);
	CHECK(sa_ring_read(server, bytes, 1, &n, &notify) == 0 && n == 1 && notify);
	CHECK(sa_ring_read(server, bytes, 1, &n, &notify) == 0 && n == 1 && !notify);
	CHECK(sa_ring_read(server, bytes, 0, &n, &notify) == 0 && n == 0 && !notify);
	CHECK(sa_ring_write(client, bytes, 0, &n, &notify) == 0 && n == 0 && !notify);
	sa_ring_destroy(server);
	sa_ring_destroy(client);
	forget(&memory);
}

/* Each lie of each counter, one by one: -EPROTO, nothing moved; an honest counter afterwards goes on as before. */
static void test_lies(void)
{
	struct memory memory = memory_of(12, 13);
	struct ring_control *page = page_of(&memory);
	sa_ring *server = side_of(&memory, SA_RING_SERVER);
	uint8_t bytes[8192];
	const uint32_t prods[] = {4097, 5000, UINT32_MAX, UINT32_MAX - 4096, UINT32_C(1) << 31};
	const uint32_t conses[] = {1, 4096, UINT32_MAX - 8192, UINT32_C(1) << 31};
	size_t n = 99;
	int notify;

	memset(bytes, 0x55, sizeof bytes);
	for (size_t i = 0; i < sizeof prods / sizeof *prods; i++) {
		atomic_store(&page->left.prod, prods[i]);
		CHECK(sa_ring_read(server, bytes, 100, &n, &notify) == -EPROTO && n == 0 && !notify);
		CHECK(sa_ring_read(server, bytes, sizeof bytes, &n, &notify) == -EPROTO && n == 0);
	}
	atomic_store(&page->left.prod, 4096);
	atomic_store(&page->left.cons, 4000); /* ours: not looked at */
	CHECK(sa_ring_read(server, bytes, sizeof bytes, &n, &notify) == 0 && n == 4096);
	atomic_store(&page->left.prod, 4095); /* backwards */
	CHECK(sa_ring_read(server, bytes, sizeof bytes, &n, &notify) == -EPROTO && n == 0);

	for (size_t i = 0; i < sizeof conses / sizeof *conses; i++) {
		atomic_store(&page->right.cons, conses[i]);
		CHECK(sa_ring_write(server, bytes, 100, &n, &notify) == -EPROTO && n == 0 && !notify);
	}
	atomic_store(&page->right.cons, 0);
	atomic_store(&page->right.prod, 17); /* ours: not looked at */
	atomic_store(&page->right_order, 20);
	CHECK(sa_ring_write(server, bytes, sizeof bytes, &n, &notify) == 0 && n == 8192);
	CHECK(atomic_load(&page->right.prod) == 8192);
	atomic_store(&page->right.cons, 8193); /* more than was written */
	CHECK(sa_ring_write(server, bytes, 1, &n, &notify) == -EPROTO && n == 0);
	sa_ring_destroy(server);
	forget(&memory);
}

/* ------------------------------------------------------------------------------------------------ two threads */

struct end {
	sa_ring *ring;
	int event;  /* ours: the peer writes it */
	int signal; /* the peer's */
	uint64_t total;
	uint64_t random;
	uint64_t wrong;
	uint64_t late; /* waits that ended by time and not by an event */
	uint64_t events;
	bool reads;
};

static void signal_peer(struct end *end, int notify)
{
	const uint64_t one = 1;

	if (notify && write(end->signal, &one, sizeof one) != sizeof one)
		end->wrong++;
	end->events += notify != 0;
}

static void wait_for_event(struct end *end)
{
	struct pollfd poll_fd = {.fd = end->event, .events = POLLIN};
	uint64_t count;

	/* Far more than a busy machine needs: an event that never comes is found, not waited for. */
	if (poll(&poll_fd, 1, 20000) != 1) {
		end->late++;
		return;
	}
	if (read(end->event, &count, sizeof count) != sizeof count)
		end->wrong++;
}

static void *move_bytes(void *argument)
{
	struct end *end = argument;
	uint8_t *buffer = exactly(100032);
	uint64_t done = 0;

	while (done < end->total && end->late == 0 && end->wrong == 0) {
		size_t ask = 1 + (size_t)(draw(&end->random) % 100000);
		size_t n;
		int notify;

		if (ask > end->total - done)
			ask = (size_t)(end->total - done);
		for (size_t i = 0; !end->reads && i < ask; i++)
			buffer[i] = byte_at(done + i);
		end->wrong += (end->reads ? sa_ring_read(end->ring, buffer, ask, &n, &notify)
		                          : sa_ring_write(end->ring, buffer, ask, &n, &notify)) != 0;
		for (size_t i = 0; end->reads && i < n; i++)
			end->wrong += buffer[i] != byte_at(done + i);
		done += n;
		signal_peer(end, notify);
		if (n < ask)
			wait_for_event(end);
	}
	free(buffer);
	return NULL;
}

/* One thread writes, one reads, and each sleeps until the other's event when it can go no further. */
static void test_threads(uint32_t left_order, uint32_t right_order, uint64_t total)
{
	struct memory memory = memory_of(left_order, right_order);
	sa_ring *server = side_of(&memory, SA_RING_SERVER);
	sa_ring *client = side_of(&memory, SA_RING_CLIENT);

	for (int way = 0; way < 2; way++) {
		const int to_reader = eventfd(0, EFD_CLOEXEC);
		const int to_writer = eventfd(0, EFD_CLOEXEC);
		struct end reader = {
			.ring = way ? client : server,
			.event = to_reader,
			.signal = to_writer,
			.total = total,
			.random = left_order,
			.reads = true,
		};
		struct end writer = {
			.ring = way ? server : client,
			.event = to_writer,
			.signal = to_reader,
			.total = total,
			.random = right_order,
		};
		pthread_t threads[2];

		CHECK(to_reader >= 0 && to_writer >= 0);
		CHECK(pthread_create(&threads[0], NULL, move_bytes, &reader) == 0);
		CHECK(pthread_create(&threads[1], NULL, move_bytes, &writer) == 0);
		CHECK(pthread_join(threads[0], NULL) == 0 && pthread_join(threads[1], NULL) == 0);
		CHECK(reader.wrong == 0 && writer.wrong == 0);
		CHECK(reader.late == 0 && writer.late == 0);
		CHECK(reader.events > 0 && writer.events > 0);
		CHECK(close(to_reader) == 0 && close(to_writer) == 0);
	}
	sa_ring_destroy(server);
	sa_ring_destroy(client);
	forget(&memory);
}

/* One byte there, one byte back, as close together as can be: each end looks for the next byte at the moment at which
 * the other writes it, so a request for an event that is lost between the two is found. */
static void *play(void *argument)
{
	struct end *end = argument;
	bool mine = !end->reads;

	for (uint64_t turn = 0; turn < end->total && end->late == 0 && end->wrong == 0; mine = !mine) {
		uint8_t byte = (uint8_t)turn;
		uint64_t count;
		int notify;
		size_t n;

		if (mine) {
			end->wrong += sa_ring_write(end->ring, &byte, 1, &n, &notify) != 0 || n != 1;
			signal_peer(end, notify);
			turn++;
			continue;
		}
		for (uint64_t tries = 0;; tries++) {
			uint8_t got;

			end->wrong += sa_ring_read(end->ring, &got, 1, &n, &notify) != 0 ||
			              (n && got != (uint8_t)(turn - !end->reads));
			if (n > 0 || end->wrong)
				break;
			/* Only an event brings us back to the ring. Its descriptor does not block: a sleep takes longer
			 * than everything that is looked for here. */
			while (read(end->event, &count, sizeof count) != sizeof count) {
				if (++tries % 1024 == 0 && seconds() - (int64_t)end->random > 60) {
					end->late++;
					return NULL;
				}
			}
		}
	}
	return NULL;
}

static void test_turns(void)
{
	struct memory memory = memory_of(10, 11);
	const int to_server = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	const int to_client = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	struct end server = {.event = to_server, .signal = to_client, .total = TURNS, .reads = true};
	struct end client = {.event = to_client, .signal = to_server, .total = TURNS};
	pthread_t threads[2];

	server.ring = side_of(&memory, SA_RING_SERVER);
	client.ring = side_of(&memory, SA_RING_CLIENT);
	server.random = client.random = (uint64_t)seconds();
	CHECK(pthread_create(&threads[0], NULL, play, &server) == 0);
	CHECK(pthread_create(&threads[1], NULL, play, &client) == 0);
	CHECK(pthread_join(threads[0], NULL) == 0 && pthread_join(threads[1], NULL) == 0);
	CHECK(server.wrong == 0 && client.wrong == 0);
	CHECK(server.late == 0 && client.late == 0);
	sa_ring_destroy(server.ring);
	sa_ring_destroy(client.ring);
	CHECK(close(to_server) == 0 && close(to_client) == 0);
	forget(&memory);
}

/* ---------------------------------------------------------------------------------------------- a hostile peer */

struct vandal {
	struct memory *memory;
	_Atomic(uint32_t) got, put; /* the ring's own counters */
	atomic_bool stop;
};

/* Writes anything into the control page, all the time; now and then something that is nearly right. */
static void *vandalise(void *argument)
{
	struct vandal *vandal = argument;
	struct ring_control *page = page_of(vandal->memory);
	uint64_t random = 1;

	while (!atomic_load_explicit(&vandal->stop, memory_order_relaxed)) {
		const uint64_t value = draw(&random);
		const uint32_t near = (uint32_t)(value >> 40) % 9000;

		switch (value % 10) {
		case 0:
			atomic_store(&page->left.prod, (uint32_t)(value >> 32));
			break;
		case 1:
			atomic_store(&page->right.cons, (uint32_t)(value >> 32));
			break;
		case 2:
			atomic_store(&page->left.prod, atomic_load(&vandal->got) + near);
			break;
		case 3:
			atomic_store(&page->right.cons, atomic_load(&vandal->put) - near);
			break;
		case 4:
			atomic_store(&page->left.cons, (uint32_t)(value >> 32));
			break;
		case 5:
			atomic_store(&page->right.prod, (uint32_t)(value >> 32));
			break;
		case 6:
			atomic_store(&page->left_order, (uint16_t)(value >> 32));
			break;
		case 7:
			atomic_store(&page->right_order, (uint16_t)(value >> 32));
			break;
		case 8:
			atomic_store(&page->cli_live, (uint8_t)(value >> 32));
			break;
		default:
			atomic_store(&page->cli_notify, (uint8_t)(value >> 32));
			break;
		}
		atomic_store(&page->srv_notify, (uint8_t)(value >> 24));
	}
	return NULL;
}

static void test_hostile(uint32_t left_order, uint32_t right_order)
{
	struct memory memory = memory_of(left_order, right_order);
	sa_ring *ring = side_of(&memory, SA_RING_SERVER);
	struct vandal vandal = {.memory = &memory};
	uint64_t random = 2;
	uint64_t refused = 0;
	uint64_t moved = 0;
	uint64_t wrong = 0;
	const int64_t start = seconds();
	pthread_t thread;

	CHECK(pthread_create(&thread, NULL, vandalise, &vandal) == 0);
	/* For a good while, and until both were seen often: what is outside of its buffer, the sanitizer finds. */
	for (uint64_t turn = 0; turn < 200000 || refused < 100 || moved < 100; turn++) {
		const size_t ask = (size_t)(draw(&random) % 9000);
		uint8_t *buffer = exactly(ask + 1);
		size_t n = SIZE_MAX;
		int notify;
		int error;

		/* The other thread may be without a processor for a while, but not that long. */
		if (turn % 65536 == 0 && seconds() - start > 60) {
			free(buffer);
			break;
		}
		error = turn & 1 ? sa_ring_read(ring, buffer, ask, &n, &notify)
		                 : sa_ring_write(ring, buffer, ask, &n, &notify);

		refused += error == -EPROTO;
		moved += error == 0 && n > 0;
		if (!error)
			atomic_fetch_add(turn & 1 ? &vandal.got : &vandal.put, (uint32_t)n);
		wrong += (error != 0 && error != -EPROTO) || n > ask || (error && n > 0);
		wrong += sa_ring_state(ring) < SA_RING_WAITING || sa_ring_state(ring) > SA_RING_CLOSED;
		free(buffer);
	}
	atomic_store(&vandal.stop, true);
	CHECK(pthread_join(thread, NULL) == 0);
	CHECK(wrong == 0);
	CHECK(refused >= 100 && moved >= 100);
	sa_ring_destroy(ring);
	forget(&memory);
}

int main(void)
{
	test_orders();
	test_offer();
	test_states();
	test_bytes(10, 11);
	test_bytes(11, 10);
	test_bytes(12, 12);
	test_bytes(16, 16);
	test_bytes(20, 11);
	test_notify();
	test_lies();
	test_threads(10, 11, 4 << 20);
	test_threads(12, 16, 32 << 20);
	test_turns();
	test_hostile(10, 11);
	test_hostile(12, 13);
	return check_done("test_ring");
}
