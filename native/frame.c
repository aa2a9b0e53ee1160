/*
 * frame.c - reads the agent's messages and writes a consumer's: msgpack arrays of numbers, texts and packed columns.
 *
 * Pure: bytes in, values out. Nothing is believed before it was compared with the bytes that are there. The formats are
 * consumer_wire.py's; what messages mean is shim_swap.c's.
 */
#include "frame.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

/* Fields of each message: n an unsigned number, t a text, and columns of entries of so many bytes: r 12, f 4. */
struct format {
	uint32_t type;
	int with_fd;
	char fields[8]; /* seven at the most */
};

static const struct format formats[] = {
	{SA_SHARE_SEGMENT, 1, "n"}, {SA_SHARE, 1, "nnrfnrf"},  {SA_UNSHARE, 0, "nn"},         {SA_PLAIN, 0, "nt"},
	{SA_SEGMENTS_GONE, 0, "f"}, {SA_GRANT_DEVICE, 1, "n"}, {SA_SHARE_GRANTS, 1, "nnnnr"},
};

struct reader {
	const uint8_t *at;
	size_t left;
};

/* UNTRUSTED: all that comes below is the peer's; every read is against `left`. */
static bool take(struct reader *reader, size_t n, const uint8_t **ret)
{
	if (n > reader->left)
		return false;
	*ret = reader->at;
	reader->at += n;
	reader->left -= n;
	return true;
}

static bool take_number(struct reader *reader, size_t width, uint64_t *ret)
{
	const uint8_t *bytes;

	if (!take(reader, width, &bytes))
		return false;
	*ret = 0;
	for (size_t i = 0; i < width; i++)
		*ret = *ret << 8 | bytes[i];
	return true;
}

static bool take_head(struct reader *reader, uint8_t *ret)
{
	const uint8_t *byte;

	if (!take(reader, 1, &byte))
		return false;
	*ret = *byte;
	return true;
}

static bool take_uint(struct reader *reader, uint64_t most, uint64_t *ret)
{
	uint8_t head;

	if (!take_head(reader, &head))
		return false;
	if (head <= 0x7f)
		*ret = head;
	else if (head < 0xcc || head > 0xcf || !take_number(reader, (size_t)1 << (head - 0xcc), ret))
		return false;
	return *ret <= most;
}

/* The bytes of a bin (three widths from c4 on) or of a str (fixstr, or three widths from d9 on). */
static bool take_bytes(struct reader *reader, bool text, const uint8_t **ret, size_t *ret_n)
{
	const uint8_t first = text ? 0xd9 : 0xc4;
	uint64_t n;
	uint8_t head;

	if (!take_head(reader, &head))
		return false;
	if (text && head >= 0xa0 && head <= 0xbf)
		n = head & 0x1f;
	else if (head < first || head > first + 2 || !take_number(reader, (size_t)1 << (head - first), &n))
		return false;
	*ret_n = (size_t)n;
	return take(reader, (size_t)n, ret);
}

static bool take_array(struct reader *reader, uint64_t *ret)
{
	uint8_t head;

	if (!take_head(reader, &head))
		return false;
	if (head >= 0x90 && head <= 0x9f) {
		*ret = head & 0x0f;
		return true;
	}
	return (head == 0xdc || head == 0xdd) && take_number(reader, head == 0xdc ? 2 : 4, ret);
}

static bool take_field(struct reader *reader, char kind, size_t *numbers, size_t *columns, struct sa_frame *ret)
{
	const size_t width = kind == 'r' ? 12 : 4;
	const uint8_t *bytes;
	uint64_t number;
	size_t n;

	if (kind == 'n') {
		if (!take_uint(reader, UINT32_MAX, &number))
			return false;
		ret->number[(*numbers)++] = (uint32_t)number;
		return true;
	}
	if (!take_bytes(reader, kind == 't', &bytes, &n))
		return false;
	if (kind == 't')
		return true; /* a reason: for people */
	if (n % width != 0 || n / width > SA_FRAME_ENTRIES)
		return false;
	ret->column[*columns] = bytes;
	ret->entries[(*columns)++] = (uint32_t)(n / width);
	return true;
}

int sa_frame_read(const uint8_t *payload, size_t length, struct sa_frame *ret)
{
	struct reader reader = {payload, length};
	const struct format *format = NULL;
	size_t numbers = 0;
	size_t columns = 0;
	uint64_t items;
	uint64_t type;

	*ret = (struct sa_frame){.type = 0};
	if (!take_array(&reader, &items) || !take_uint(&reader, UINT32_MAX, &type))
		return -EPROTO;
	for (size_t i = 0; i < sizeof formats / sizeof formats[0]; i++) {
		if (formats[i].type == type)
			format = &formats[i];
	}
	if (format == NULL || items != strlen(format->fields) + 1)
		return -EPROTO;
	ret->type = (uint32_t)type;
	ret->with_fd = format->with_fd;
	for (const char *kind = format->fields; *kind; kind++) {
		if (!take_field(&reader, *kind, &numbers, &columns, ret))
			return -EPROTO;
	}
	if (reader.left != 0 ||
	    (type == SA_SHARE && (ret->entries[0] != ret->entries[1] || ret->entries[2] != ret->entries[3])))
		return -EPROTO;
	return 0;
}

size_t sa_frame_write(uint32_t type, const uint64_t *fields, size_t n, uint8_t *ret_frame)
{
	uint8_t *at = ret_frame + SA_FRAME_HEADER;
	uint32_t length;

	*at++ = (uint8_t)(0x91 + n);
	*at++ = (uint8_t)type;
	for (size_t i = 0; i < n; i++) {
		*at++ = 0xcf;
		for (int shift = 56; shift >= 0; shift -= 8)
			*at++ = (uint8_t)(fields[i] >> shift);
	}
	length = (uint32_t)(at - ret_frame) - SA_FRAME_HEADER;
	for (int i = 0; i < SA_FRAME_HEADER; i++)
		ret_frame[i] = (uint8_t)(length >> 8 * i);
	return (size_t)(at - ret_frame);
}

uint32_t sa_frame_u32(const uint8_t *column, size_t at)
{
	uint32_t value;

	memcpy(&value, column + at * 4, sizeof value);
	return value;
}
