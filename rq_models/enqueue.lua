-- Enqueue jobs that differ in their id and input only, in one step: all of them are queued, or none.
--
-- KEYS  1 queue list, 2 rq:queues
-- ARGV  1 RQ's key prefix, 2 'RPUSH' or 'LPUSH', 3 seconds that a job may wait (0: for ever), 4 length of what follows: the
--       hash fields and values that all jobs share; then an id and a data field for each job
-- Returns how many jobs were there already. They are left as they are: so a repetition, after a reply that was lost, does
-- no harm.
local call = redis.call
local prefix, push, ttl, shared = ARGV[1] .. ':job:', ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local fields = {unpack(ARGV, 5, 4 + shared)}
local known = 0
call('SADD', KEYS[2], KEYS[1])
for n = 5 + shared, #ARGV, 2 do
  local id = ARGV[n]
  local job = prefix .. id
  if call('EXISTS', job) == 1 then
    known = known + 1
  else
    call('HSET', job, 'data', ARGV[n + 1], unpack(fields))
    if ttl > 0 then
      call('EXPIRE', job, ttl)
    end
    call(push, KEYS[1], id)
  end
end
return known
