/*
 * test_frame.c - frame.c: frames as the agent writes them (tests/wire/golden has the same bytes), every truncation and
 * every changed byte of them, and announced sizes that are not there. Run under the sanitizers, it shows that nothing
 * is read past the payload: each is in a block of its own size.
 */
#include "check.h"
#include "frame.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct payload {
	size_t length;
	uint8_t bytes[64];
};

static int read_exactly(const uint8_t *bytes, size_t length, struct sa_frame *ret)
{
	uint8_t *copy = malloc(length ? length : 1);
	int error;

	if (!CHECK(copy != NULL))
		exit(1);
	memcpy(copy, bytes, length);
	error = sa_frame_read(copy, length, ret);
	if (error == 0 && ret->entries[0])
		ret->number[3] = sa_frame_u32(ret->column[0], 0); /* the columns are inside the block */
	free(copy);
	return error;
}

static const struct payload share = {45, {0x98, 0x22, 0x01, 0x02, 0xc4, 0x0c, 0, 0, 0, 0,    0x11, 0,    0, 0, 3,
                                          0,    0,    0,    0xc4, 0x04, 4,    0, 0, 0, 0x00, 0xc4, 0x0c, 1, 0, 0,
                                          0,    0x12, 0,    0,    0,    1,    0, 0, 0, 0xc4, 0x04, 4,    0, 0, 0}};
static const struct payload unshare = {4, {0x93, 0x23, 0x01, 0x02}};
static const struct payload plain = {7, {0x93, 0x24, 0x01, 0xa3, 'w', 'h', 'y'}};
static const struct payload segment = {8, {0xdc, 0, 2, 0xcc, 0x21, 0xcd, 1, 0}};
static const struct payload gone = {7, {0x92, 0x25, 0xc4, 0x04, 5, 0, 0}};

static void test_messages(void)
{
	struct sa_frame frame;
	struct payload whole = gone;

	CHECK(sa_frame_read(share.bytes, share.length, &frame) == 0);
	CHECK(frame.type == SA_SHARE && frame.with_fd == 1 && frame.number[0] == 1 && frame.number[1] == 2);
	CHECK(frame.entries[0] == 1 && frame.entries[1] == 1 && frame.number[2] == 0);
	CHECK(frame.entries[2] == 1 && frame.entries[3] == 1 && sa_frame_u32(frame.column[2], 1) == 18);
	CHECK(sa_frame_u32(frame.column[0], 1) == 17 && sa_frame_u32(frame.column[1], 0) == 4);
	CHECK(sa_frame_read(unshare.bytes, unshare.length, &frame) == 0 && frame.type == SA_UNSHARE && !frame.with_fd);
	CHECK(sa_frame_read(plain.bytes, plain.length, &frame) == 0 && frame.type == SA_PLAIN);
	CHECK(sa_frame_read(segment.bytes, segment.length, &frame) == 0 && frame.number[0] == 256);
	CHECK(sa_frame_read(gone.bytes, gone.length, &frame) == -EPROTO);
	whole.bytes[whole.length++] = 0;
	CHECK(sa_frame_read(whole.bytes, whole.length, &frame) == 0 && frame.entries[0] == 1);
}

static void test_broken(void)
{
	const struct payload *all[] = {&share, &unshare, &plain, &segment};
	struct sa_frame frame;

	for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
		struct payload longer = *all[i];

		for (size_t length = 0; length < all[i]->length; length++)
			CHECK(read_exactly(all[i]->bytes, length, &frame) == -EPROTO);
		longer.bytes[longer.length++] = 0;
		CHECK(read_exactly(longer.bytes, longer.length, &frame) == -EPROTO);
		for (size_t at = 0; at < all[i]->length; at++) {
			struct payload changed = *all[i];

			for (unsigned value = 0; value < 256; value++) {
				changed.bytes[at] = (uint8_t)value;
				/* Some are messages still; none may be read outside. */
				(void)read_exactly(changed.bytes, changed.length, &frame);
			}
		}
	}
}

static void test_announced_sizes(void)
{
	static const struct payload huge[] = {
		{7, {0x92, 0x25, 0xc6, 0xff, 0xff, 0xff, 0xff}},
		{5, {0xdd, 0xff, 0xff, 0xff, 0xff}},
		{7, {0x93, 0x24, 1, 0xdb, 0xff, 0xff, 0xff}},
		{11, {0x92, 0x21, 0xcf, 0, 0, 0, 1, 0, 0, 0, 0}},
		{6, {0x92, 0x25, 0xc4, 0x02, 1, 2}},
		{2, {0x91, 0x07}},
	};
	struct sa_frame frame;

	for (size_t i = 0; i < sizeof huge / sizeof huge[0]; i++)
		CHECK(read_exactly(huge[i].bytes, huge[i].length, &frame) == -EPROTO);
}

static void test_writing(void)
{
	const uint8_t want[] = {20, 0, 0, 0, 0x93, 1, 0xcf, 0, 0, 0, 0, 0, 0, 0, 7, 0xcf, 0, 0, 1, 0, 0, 0, 0, 2};
	uint8_t frame[SA_FRAME_SENT];

	CHECK(sa_frame_write(SA_OPEN, (uint64_t[]){7, (1ULL << 40) + 2}, 2, frame) == sizeof want);
	CHECK(memcmp(frame, want, sizeof want) == 0);
	CHECK(sa_frame_write(SA_UNCHANGED, NULL, 0, frame) == 6);
	CHECK(memcmp(frame, (uint8_t[]){2, 0, 0, 0, 0x91, 5}, 6) == 0);
}

int main(void)
{
	test_messages();
	test_broken();
	test_announced_sizes();
	test_writing();
	return check_done("test_frame");
}
