{{ select_split('train', with_batch=true) }}
