/*
 * frame.h - the agent's messages to a consumer, for consumers without Python (the shim). docs/protocol.md has the
 * formats.
 */
#ifndef SA_FRAME_H
#define SA_FRAME_H

#include <stddef.h>
#include <stdint.h>

enum {
	SA_FRAME_HEADER = 4,     /* u32: length of the payload */
	SA_FRAME_MOST = 1 << 21, /* longest payload that an agent may send */
	SA_FRAME_SENT = 64,      /* room for any message that sa_frame_write makes */
	SA_FRAME_ENTRIES = 65536 /* most entries of a column */
};

/* Types of messages: consumer -> agent, agent -> consumer. */
enum {
	SA_OPEN = 1,
	SA_CLOSE = 2,
	SA_MAPPED = 3,
	SA_LET_GO = 4,
	SA_UNCHANGED = 5,
	SA_SHARE_SEGMENT = 33,
	SA_SHARE = 34,
	SA_UNSHARE = 35,
	SA_PLAIN = 36,
	SA_SEGMENTS_GONE = 37,
	SA_GRANT_DEVICE = 38,
	SA_SHARE_GRANTS = 39
};

enum { SA_MAPPED_DONE = 0, SA_MAPPED_DIFFERENT = 1, SA_MAPPED_NO_ROOM = 2 };

/* One message. Columns point into the payload that it was read from. */
struct sa_frame {
	uint32_t type;
	int with_fd;              /* a descriptor travels with it */
	uint32_t number[4];       /* its unsigned fields, in their order */
	const uint8_t *column[4]; /* its columns, in their order */
	uint32_t entries[4];      /* how many entries these have */
};

/* Read a payload. -EPROTO: it is not what the protocol allows. */
int sa_frame_read(const uint8_t *payload, size_t length, struct sa_frame *ret);

/* Write a frame, header included: a type and its unsigned fields. ret_frame has room for SA_FRAME_SENT bytes; n is 4 at
 * the most. Returns its length. */
size_t sa_frame_write(uint32_t type, const uint64_t *fields, size_t n, uint8_t *ret_frame);

/* Entry of a column of u32. */
uint32_t sa_frame_u32(const uint8_t *column, size_t at);

#endif
