/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * shareview: a read-only stacked view of a folder whose files may have granted pages attached.
 *
 * super.c    mount, unmount, module, suspend
 * inode.c    names, attributes, directories
 * file.c     open, read, mmap, faults
 * table.c    attached tables: grants, lease, compare
 * control.c  /dev/shareview
 * compat.h   differences between kernels
 *
 * The life of a table and the order of the locks are told in table.c.
 */
#ifndef SHAREVIEW_INTERNAL_H
#define SHAREVIEW_INTERNAL_H

#include <linux/fs.h>
#include <linux/mutex.h>
#include <linux/percpu.h>
#include <linux/srcu.h>
#include <linux/workqueue.h>
#include <xen/grant_table.h>

#include "compat.h"
#include "shareview.h"

#define SV_MAGIC 0x53485657 /* "SHVW" */

#undef pr_fmt
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

struct sv_super {
	struct path lower;
	char *lower_text;
	bool verify_all;
	atomic_t tables; /* attached, or not yet let go of completely: each holds an inode */
};

struct sv_table {
	unsigned long span;	/* entries in by_page: the last attached page, and one */
	unsigned int count;	/* granted pages */
	struct page **by_page;	/* file page -> granted page; NULL: the lower file's */
	struct page **pages;	/* the granted pages, dense */
	struct gnttab_unmap_grant_ref *unmap;
	struct inode *inode;
	struct file *lower;	/* holds the lease */
	u64 compared;
	unsigned long broken;	/* bit 0: somebody wants to write */
	struct work_struct broken_work;
	struct delayed_work unmap_work;
	unsigned int tries;
	struct list_head link;	/* in sv_tables */
};

struct sv_inode {
	struct inode *lower;	/* set once, before the inode is visible */
	struct sv_table __rcu *table; /* changes under lock; readers under sv_srcu */
	struct mutex lock;
	struct inode vfs_inode;
};

struct sv_counters {
	u64 read_bytes;
	u64 faults;
	u64 lower_faults;
};

static inline struct sv_inode *sv_inode(const struct inode *inode)
{
	return container_of(inode, struct sv_inode, vfs_inode);
}

static inline struct sv_super *sv_super(const struct super_block *sb)
{
	return sb->s_fs_info;
}

static inline struct dentry *sv_lower_dentry(const struct dentry *dentry)
{
	return dentry->d_fsdata;
}

static inline void sv_lower_path(const struct dentry *dentry, struct path *ret)
{
	ret->mnt = sv_super(dentry->d_sb)->lower.mnt;
	ret->dentry = sv_lower_dentry(dentry);
}

/* The granted page of a file's page, or NULL. Under sv_srcu, as long as the page is used. */
static inline struct page *sv_table_page(const struct sv_table *table, unsigned long page)
{
	return table && page < table->span ? table->by_page[page] : NULL;
}

extern struct srcu_struct sv_srcu;
extern struct sv_counters __percpu *sv_counters;

/* inode.c */
extern const struct dentry_operations sv_dentry_operations;
extern SV_XATTR_LIST sv_xattr_handlers[];
struct inode *sv_iget(struct super_block *sb, struct inode *lower);
int sv_inode_cache_create(void);
void sv_inode_cache_destroy(void);
struct inode *sv_alloc_inode(struct super_block *sb);
void sv_free_inode(struct inode *inode);
void sv_evict_inode(struct inode *inode);

/* file.c */
extern const struct file_operations sv_file_operations;
extern const struct file_operations sv_dir_operations;

/* table.c */
int sv_tables_init(void);
void sv_tables_exit(void);
int sv_attach(struct file *file, const struct shareview_attach *args,
	      const struct shareview_run *runs, u64 *compared);
int sv_detach(struct inode *inode);
void sv_detach_all(struct super_block *sb);
int sv_suspend(void);
void sv_state(struct inode *inode, struct shareview_state *ret);
void sv_info(struct shareview_info *ret);

/* control.c */
int sv_control_init(void);
void sv_control_exit(void);
void sv_control_wake(void);
int sv_control_holds(void);

#endif
