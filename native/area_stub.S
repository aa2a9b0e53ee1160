/*
 * area_stub.S - the kernel of an area domain: something for the toolstack to load. An area domain is created paused and
 * stays so; its memory and its grant table are what matters.
 *
 * The note is what makes a 32-bit ELF file bootable as a PVH domain (xen/include/public/elfnote.h). Should somebody
 * unpause the domain, the code waits for interrupts that nothing sends: with them switched off Xen would take the halt
 * for the end of the domain.
 */
	.section .note.Xen, "a", @note
	.balign 4
	.long 4, 4, 18 /* sizes of name and value, XEN_ELFNOTE_PHYS32_ENTRY */
	.asciz "Xen"
	.long _start

	.text
	.code32
	.globl _start
_start:
	sti
1:	hlt
	jmp 1b
